"""A page in the browser to talk to a model: text and pictures in one answer, pictures while they appear."""

from lmfusion.serving.page.app import create_app, serve_page
from lmfusion.serving.page.page import build_page

__all__ = ["build_page", "create_app", "serve_page"]
