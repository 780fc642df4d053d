"""What is on the page, and what does each part of it do? A chat, its settings, and the pictures drawn in it."""

import html
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmfusion.generation.events import ImageEnd
from lmfusion.generation.worker import EngineWorker, QueueFull, Stopped
from lmfusion.serving.page import display
from lmfusion.serving.page.actions import Actions
from lmfusion.serving.page.session import Picture
from lmfusion.serving.page.settings import build_settings, has_chat_template, read_options
from lmfusion.serving.page.style import SWITCH_DARK

if TYPE_CHECKING:
    import gradio as gr

    from lmfusion.model.modeling import LMFusion

SECONDS_KEPT = 24 * 3600
"""How long gradio keeps what was uploaded."""
PLAIN_HINT = "This model has no chat template: it goes on from your text as it is, and remembers nothing of before."
_SHOWN_SETTINGS = {
    "seed": "Seed",
    "sampler": "Sampler",
    "num_steps": "Steps",
    "guidance_scale": "Guidance",
    "negative_prompt": "Keep away from",
    "image_size": "Pixels a side",
    "temperature": "Temperature",
    "top_p": "Top-p",
}


def build_page(
    worker: EngineWorker,
    model: "LMFusion",
    folder: Path,
    *,
    name: str = "",
    examples: Sequence[str] = (),
    way: str = "conversation",
) -> "gr.Blocks":
    """The page, for `lmfusion.serving.page.app` to serve.

    folder: where the pictures of all tabs are put, each tab's in a folder of its own; the server must give out files in
    it. name: what the title calls the model. examples: prompts to click on. way: what the model reads at first, one of
    `lmfusion.serving.page.settings.WAYS`.
    """
    import gradio as gr

    actions = Actions(worker, model, folder)
    with gr.Blocks(
        title=name or "lmfusion", analytics_enabled=False, delete_cache=(3600, SECONDS_KEPT), fill_width=True
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
                    settings = build_settings(model, worker.engine.limits, way)
                with gr.Tab("Pictures", elem_id="pictures-tab"):
                    gallery, details, download = _build_gallery(model)

        async def respond(values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
            asked = values[box] or {"text": "", "files": []}
            try:
                session = actions.sessions.of(request.session_hash, _address(request))
                options, way = read_options({key: values[item] for key, item in settings.items()})
                async for events in actions.answer(session, asked["text"], asked["files"], options, way):
                    update: dict[Any, Any] = {chat: display.messages(session.turns)}
                    if not events:
                        update[box] = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
                        update[settings["seed"]] = options.seed
                    if any(isinstance(event, ImageEnd) for event in events):
                        update[gallery] = [(str(picture.path), _caption(picture)) for picture in session.pictures[::-1]]
                    yield update
                yield {box: gr.MultimodalTextbox(submit_btn=True, stop_btn=False)}
            except (ValueError, QueueFull, Stopped) as error:
                gr.Warning(html.escape(str(error)), title="This cannot be answered")
                yield {chat: gr.skip()}

        async def use_example(example: gr.SelectData) -> dict[str, Any]:
            return {"text": example.value["text"], "files": []}

        async def stop(request: gr.Request) -> None:
            if session := actions.sessions.find(request.session_hash):
                session.stop()

        async def empty(request: gr.Request) -> list[Any]:
            if session := actions.sessions.find(request.session_hash):
                session.clear()
            return []

        async def show(selected: gr.SelectData, request: gr.Request) -> tuple[str, Any]:
            session = actions.sessions.find(request.session_hash)
            pictures = session.pictures[::-1] if session else []
            if selected.index >= len(pictures):
                return "", gr.DownloadButton(visible=False)
            picture = pictures[selected.index]
            return _describe(picture), gr.DownloadButton(value=picture.path, visible=True)

        async def close(request: gr.Request) -> None:
            actions.sessions.close(request.session_hash)

        # No limit here: the worker's queue is the limit, and says so when it is full
        common: dict[str, Any] = dict(show_progress="hidden", concurrency_limit=None, api_visibility="private")
        asking: dict[str, Any] = dict(
            fn=respond, inputs={box, *settings.values()}, outputs=[chat, box, gallery, settings["seed"]], **common
        )
        box.submit(**asking)
        chat.example_select(use_example, None, box, **common).then(**asking)
        box.stop(stop, None, None, queue=False, **common)
        clear.click(empty, None, chat, queue=False, **common)
        gallery.select(show, None, [details, download], queue=False, **common)
        dark.click(None, None, None, js=SWITCH_DARK)
        page.unload(close)
    return page


def _address(request: "gr.Request") -> str:
    return str(request.client.host) if request.client else ""


def _title(model: "LMFusion", name: str) -> str:
    size = model.codec.config.image_size
    facts = [f"draws {size} × {size} pixels", f"on {model.device}"]
    if model.base is not None:
        facts.insert(0, Path(model.base.name).name)
    lines = [f"<h1>{html.escape(name or 'lmfusion')}</h1>", f"<p>{html.escape(' · '.join(facts))}</p>"]
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
        placeholder="Ask for a picture, or show one.",
        examples=[{"text": example} for example in examples] or None,
    )
    box = gr.MultimodalTextbox(
        elem_id="box",
        show_label=False,
        container=False,
        placeholder="Write, or drop a picture here",
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

    is_tiny = model.codec.config.image_size < display.ENLARGED
    gallery = gr.Gallery(
        elem_id="pictures",
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
    details = gr.HTML("What is drawn here is collected here.", elem_id="details", padding=False)
    return gallery, details, gr.DownloadButton("Download PNG", elem_id="download", size="sm", visible=False)


def _caption(picture: Picture) -> str:
    """What a screen reader says of a picture in the gallery."""
    return f"{picture.settings.get('prompt', 'picture')} (seed {picture.settings.get('seed', 0)})"


def _describe(picture: Picture) -> str:
    """What a picture was made with, as HTML."""
    rows = [("Prompt", picture.settings.get("prompt", ""))]
    rows += [(label, picture.settings.get(key)) for key, label in _SHOWN_SETTINGS.items()]
    table = "".join(
        f"<tr><th>{label}</th><td>{html.escape(str(value))}</td></tr>" for label, value in rows if value is not None
    )
    return f"{display.picture(picture)}<table>{table}</table>"
