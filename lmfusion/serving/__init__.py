"""Serves a model over HTTP: OpenAI's chat API (`http`) and a page for the browser (`page`). See docs/serving.md.

The API needs `pip install -e ".[serve]"`, the page `pip install -e ".[page]"`.
"""
