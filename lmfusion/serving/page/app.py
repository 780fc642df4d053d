"""Serves the page: gradio in a FastAPI app that requests nothing from other machines."""

import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmfusion.generation.previews import preview_map
from lmfusion.serving.page.page import build_page
from lmfusion.serving.page.style import CSS, theme
from lmfusion.serving.page.uploads import MAX_UPLOAD_BYTES

if TYPE_CHECKING:
    import socket

    from fastapi import FastAPI

    from lmfusion.generation.worker import EngineWorker
    from lmfusion.model.modeling import LMFusion


def require_gradio() -> None:
    """Raises ValueError if gradio is not installed."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        missing = f"the page needs gradio ({error.name} is not installed)"
        raise ValueError(f'{missing}; pip install -e ".[page]"') from None


def create_app(
    worker: "EngineWorker",
    model: "LMFusion",
    folder: Path,
    *,
    name: str = "",
    examples: Sequence[str] = (),
    prompt_mode: str = "conversation",
    allowed_hosts: Collection[str] = (),
) -> "FastAPI":
    """Create an app with the page at /.

    Args:
        worker: answers the messages.
        model: the model of `worker`.
        folder: where uploads and generated images are stored. It should be empty and used for nothing else.
        name: the model's name in the title.
        examples: prompts to click on.
        prompt_mode: the prompt mode selected at first, one of `lmfusion.serving.page.settings.PROMPT_MODES`.
        allowed_hosts: names by which browsers may call the page, besides localhost and IP addresses.

    Raises:
        ValueError: if gradio is not installed.
    """
    require_gradio()
    import gradio as gr
    from fastapi import FastAPI

    from lmfusion.serving.middleware import HostAndKeyMiddleware
    from lmfusion.serving.page.no_fetch import NoFetchMiddleware

    uploads, images = folder / "gradio", folder / "images"
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # gradio has no other setting for it
    page = build_page(worker, model, images, name=name, examples=examples, prompt_mode=prompt_mode)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(NoFetchMiddleware, folder=uploads)
    app.add_middleware(HostAndKeyMiddleware, allowed_hosts=allowed_hosts, same_origin=True)  # runs first
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        allowed_paths=[str(images)],
        max_file_size=MAX_UPLOAD_BYTES,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        theme=theme(),
        css=CSS,
    )


def serve_page(
    worker: "EngineWorker",
    model: "LMFusion",
    listener: "socket.socket",
    *,
    host: str,
    name: str = "",
    examples: Sequence[str] = (),
    prompt_mode: str = "conversation",
    allowed_hosts: Collection[str] = (),
) -> None:
    """Serve the page on a bound socket until Ctrl-C or SIGTERM, then delete images and uploads.

    listener: a bound socket. host: the address it was bound to, for the URL that is printed. The other arguments are
    those of `create_app`.

    Raises:
        ValueError: if gradio is not installed.
    """
    preview_map(model.codec)  # may take seconds: do it before a user waits for it
    with tempfile.TemporaryDirectory(prefix="lmfusion-page-", ignore_cleanup_errors=True) as folder:
        app = create_app(
            worker,
            model,
            Path(folder),
            name=name,
            examples=examples,
            prompt_mode=prompt_mode,
            allowed_hosts=allowed_hosts,
        )

        from lmfusion.serving.connections import LimitedServer
        from lmfusion.serving.lifecycle import run_until_signal, url_of

        # An open tab is a connection that never ends by itself, so shutdown does not wait for it.
        server = LimitedServer(app, timeout_graceful_shutdown=1)
        print(f"open {url_of(host, listener)} in a browser (Ctrl-C ends it)", flush=True)
        run_until_signal(server, listener)
