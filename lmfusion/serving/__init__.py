"""How do others reach a model over HTTP? OpenAI's chat API with images in and out; see docs/server.md.

Needs fastapi and uvicorn (`pip install -e ".[serve]"`); `lmfusion.serving.lifecycle` says so where they are missing.
"""
