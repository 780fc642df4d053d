"""The HTTP API: OpenAI's chat endpoint with images in and out."""
