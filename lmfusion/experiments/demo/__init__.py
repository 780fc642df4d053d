"""The demo: adapt an LLM, train on real digits, generate images and captions, and verify that its text is unchanged."""
