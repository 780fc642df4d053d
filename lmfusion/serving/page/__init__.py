"""A page in the browser to chat with a model: text and images in one answer, images while they are denoised."""

from lmfusion.serving.page.app import create_app, serve_page
from lmfusion.serving.page.page import build_page

__all__ = ["build_page", "create_app", "serve_page"]
