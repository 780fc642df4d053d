"""The page: a chat, its settings, a gallery of generated images, and the handlers behind them."""

import html
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmfusion.generation.events import ImageEnd
from lmfusion.generation.worker import EngineWorker, QueueFull, Stopped
from lmfusion.serving.page import display
from lmfusion.serving.page.actions import Actions
from lmfusion.serving.page.session import ChatImage
from lmfusion.serving.page.settings import build_settings, has_chat_template, read_options
from lmfusion.serving.page.style import SWITCH_DARK

if TYPE_CHECKING:
    import gradio as gr

    from lmfusion.model.modeling import LMFusion

UPLOAD_SECONDS = 24 * 3600
"""Time after which gradio deletes an upload."""
PLAIN_HINT = "This model has no chat template: it continues your text as it is, and does not see earlier messages."
_SHOWN_SETTINGS = {
    "seed": "Seed",
    "sampler": "Sampler",
    "num_steps": "Steps",
    "guidance_scale": "Guidance scale",
    "negative_prompt": "Negative prompt",
    "image_size": "Image size",
    "temperature": "Temperature",
    "top_p": "Top p",
}


def build_page(
    worker: EngineWorker,
    model: "LMFusion",
    folder: Path,
    *,
    name: str = "",
    examples: Sequence[str] = (),
    prompt_mode: str = "conversation",
) -> "gr.Blocks":
    """Build the page that `lmfusion.serving.page.app` serves.

    Args:
        worker: answers the messages.
        model: the model of `worker`.
        folder: where the images of all tabs are stored, each tab's in a folder of its own. The server must serve it.
        name: the model's name in the title.
        examples: prompts to click on.
        prompt_mode: the prompt mode selected at first, one of `lmfusion.serving.page.settings.PROMPT_MODES`.
    """
    import gradio as gr

    actions = Actions(worker, model, folder)
    with gr.Blocks(
        title=name or "lmfusion", analytics_enabled=False, delete_cache=(3600, UPLOAD_SECONDS), fill_width=True
    ) as page:
        with gr.Row(elem_id="head"):
            gr.HTML(_title(model, name), elem_id="title", padding=False)
            clear = gr.Button("Clear", elem_id="clear", size="sm", scale=0, min_width=80)
            dark = gr.Button("Light / dark", elem_id="dark", size="sm", scale=0, min_width=110)
        with gr.Row():
            with gr.Column(scale=3, min_width=380):
                chat, box = _build_chat(examples)
            with gr.Column(scale=1, min_width=310, elem_id="side"), gr.Tabs():
                with gr.Tab("Settings"):
                    settings = build_settings(model, worker.engine.limits, prompt_mode)
                with gr.Tab("Images", elem_id="gallery-tab"):
                    gallery, details, download = _build_gallery(model)

        async def respond(values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
            message = values[box] or {"text": "", "files": []}
            try:
                session = actions.sessions.of(request.session_hash, _address(request))
                options, prompt_mode = read_options({key: values[item] for key, item in settings.items()})
                async for events in actions.answer(session, message["text"], message["files"], options, prompt_mode):
                    update: dict[Any, Any] = {chat: display.messages(session.turns)}
                    if not events:
                        update[box] = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
                        update[settings["seed"]] = options.seed
                    if any(isinstance(event, ImageEnd) for event in events):
                        update[gallery] = [(str(image.path), _caption(image)) for image in session.images[::-1]]
                    yield update
                yield {box: gr.MultimodalTextbox(submit_btn=True, stop_btn=False)}
            except (ValueError, QueueFull, Stopped) as error:
                gr.Warning(html.escape(str(error)), title="No answer")
                yield {chat: gr.skip()}

        async def use_example(example: gr.SelectData) -> dict[str, Any]:
            return {"text": example.value["text"], "files": []}

        async def stop(request: gr.Request) -> None:
            if session := actions.sessions.find(request.session_hash):
                session.stop()

        async def clear_chat(request: gr.Request) -> list[Any]:
            if session := actions.sessions.find(request.session_hash):
                session.clear()
            return []

        async def show(selected: gr.SelectData, request: gr.Request) -> tuple[str, Any]:
            session = actions.sessions.find(request.session_hash)
            images = session.images[::-1] if session else []
            if selected.index >= len(images):
                return "", gr.DownloadButton(visible=False)
            image = images[selected.index]
            return _describe(image), gr.DownloadButton(value=image.path, visible=True)

        async def close(request: gr.Request) -> None:
            actions.sessions.close(request.session_hash)

        # No limit here: the worker's queue has one, with an error message for the user.
        common: dict[str, Any] = dict(show_progress="hidden", concurrency_limit=None, api_visibility="private")
        answering: dict[str, Any] = dict(
            fn=respond, inputs={box, *settings.values()}, outputs=[chat, box, gallery, settings["seed"]], **common
        )
        box.submit(**answering)
        chat.example_select(use_example, None, box, **common).then(**answering)
        box.stop(stop, None, None, queue=False, **common)
        clear.click(clear_chat, None, chat, queue=False, **common)
        gallery.select(show, None, [details, download], queue=False, **common)
        dark.click(None, None, None, js=SWITCH_DARK)
        page.unload(close)
    return page


def _address(request: "gr.Request") -> str:
    return str(request.client.host) if request.client else ""


def _title(model: "LMFusion", name: str) -> str:
    size = model.codec.config.image_size
    details = [f"generates {size} × {size} pixels", f"on {model.device}"]
    if model.base is not None:
        details.insert(0, Path(model.base.name).name)
    lines = [f"<h1>{html.escape(name or 'lmfusion')}</h1>", f"<p>{html.escape(' · '.join(details))}</p>"]
    if not has_chat_template(model):
        lines.append(f'<p class="hint">{PLAIN_HINT}</p>')
    return "".join(lines)


def _build_chat(examples: Sequence[str]) -> tuple["gr.Chatbot", "gr.MultimodalTextbox"]:
    import gradio as gr

    chat = gr.Chatbot(
        elem_id="chat",
        show_label=False,
        height=None,
        buttons=[],
        feedback_options=None,
        allow_tags=False,
        latex_delimiters=[],
        placeholder="Ask for an image, or add one.",
        examples=[{"text": example} for example in examples] or None,
    )
    box = gr.MultimodalTextbox(
        elem_id="box",
        show_label=False,
        container=False,
        placeholder="Write a message, or drop an image here",
        sources=["upload"],
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=100_000,
        max_lines=8,
        autofocus=True,
    )
    return chat, box


def _build_gallery(model: "LMFusion") -> tuple["gr.Gallery", "gr.HTML", "gr.DownloadButton"]:
    import gradio as gr

    is_tiny = model.codec.config.image_size < display.MIN_SHOWN_SIDE
    gallery = gr.Gallery(
        elem_id="gallery",
        elem_classes=["pixelated"] if is_tiny else [],
        show_label=False,
        columns=3,
        fit_columns=False,
        height="auto",
        allow_preview=False,
        interactive=False,
        object_fit="contain",
        buttons=[],
    )
    details = gr.HTML("Generated images appear here.", elem_id="details", padding=False)
    return gallery, details, gr.DownloadButton("Download PNG", elem_id="download", size="sm", visible=False)


def _caption(image: ChatImage) -> str:
    """The text of an image in the gallery for screen readers."""
    return f"{image.settings.get('prompt', 'image')} (seed {image.settings.get('seed', 0)})"


def _describe(image: ChatImage) -> str:
    """An image and its settings as HTML."""
    lines = [("Prompt", image.settings.get("prompt", ""))]
    lines += [(label, image.settings.get(key)) for key, label in _SHOWN_SETTINGS.items()]
    table = "".join(
        f"<tr><th>{label}</th><td>{html.escape(str(value))}</td></tr>" for label, value in lines if value is not None
    )
    return f"{display.image_html(image)}<table>{table}</table>"
