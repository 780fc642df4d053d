"""Renders a conversation for the page: turns become chat messages of Markdown, images and previews."""

import base64
import html
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from PIL import Image

from lmfusion.serving.page.session import ChatImage, PartialImage, Turn, TurnPart

MIN_SHOWN_SIDE = 192
"""Pixels. Smaller images are enlarged up to this size by a whole factor."""
MAX_PNG_SIDE = 64
"""Pixels. Larger previews are sent as JPEG."""

_LINE = re.compile(r"\r\n|\r|\n")
_FENCE = re.compile(r" {0,3}(?:(`{3,})([^`]*)|(~{3,})(.*))")
_LANGUAGE = re.compile(r"[\w+#.-]*")
_CODE_SPAN = re.compile(r"(?<![\\`])(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


def messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The value of a `gr.Chatbot`. Texts are Markdown; HTML in them is shown as typed."""
    return [{"role": turn.role, "content": [_text(piece) for piece in _pieces(turn)]} for turn in turns]


def image_html(image: ChatImage) -> str:
    """HTML of a finished image, which the browser loads from the page's server."""
    alt = f"Generated image: {image.settings.get('prompt', '')}" if image.settings else "Your image"
    return _img(f"gradio_api/file={quote(str(image.path))}", image.image.width, image.image.height, alt, "image")


def _pieces(turn: Turn) -> list[str]:
    pieces = [_piece(part) for part in turn.parts]
    if not turn.is_finished and not turn.parts:
        pieces.append('<span class="waiting" role="status">waiting for the model</span>')
    if turn.note:
        pieces.append(f'<div class="note">{html.escape(turn.note)}</div>')
    return pieces


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _piece(part: TurnPart) -> str:
    match part:
        case ChatImage():
            return image_html(part)
        case PartialImage():
            return _partial_image(part)
        case str():
            return _without_html(part)


def _partial_image(partial: PartialImage) -> str:
    progress = f"step {partial.step} of {partial.num_steps}"
    if partial.preview is None:
        style = (
            f"width:{_shown_size(partial.width, partial.height)[0]}px; aspect-ratio:{partial.width}/{partial.height}"
        )
        preview = f'<div class="blank" style="{style}"></div>'
    else:
        source = _data_url(partial.preview)
        preview = _img(source, partial.width, partial.height, f"Preview, {progress}", "preview")
    if partial.is_stopped:
        return f'{preview}<div class="note">stopped at {progress}</div>'
    return f'{preview}<progress value="{partial.step}" max="{partial.num_steps}" aria-label="{progress}"></progress>'


def _img(source: str, width: int, height: int, alt: str, css_class: str) -> str:
    shown_width, shown_height = _shown_size(width, height)
    css_class += " pixelated" if shown_width > width else ""
    return (
        f'<img class="{css_class}" src="{source}" alt="{html.escape(alt)}" '
        f'style="width:{shown_width}px; aspect-ratio:{shown_width}/{shown_height}">'
    )


def _shown_size(width: int, height: int) -> tuple[int, int]:
    """Width and height on the page in pixels. Small images are enlarged by a whole factor."""
    factor = max(1, MIN_SHOWN_SIDE // max(width, height))
    return width * factor, height * factor


def _data_url(image: Image.Image) -> str:
    kind = "PNG" if max(image.size) <= MAX_PNG_SIDE else "JPEG"
    file = io.BytesIO()
    image.save(file, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _without_html(text: str) -> str:
    """Markdown in which HTML tags are escaped.

    A "<" stays as it is only in fenced code. The fences are rewritten so that every renderer agrees on the lines where
    the code begins and ends. Renderers differ in what they take for inline code, so it becomes a code element here.
    """
    done: list[str] = []
    plain: list[str] = []
    lines = iter(_LINE.split(text))
    for line in lines:
        fence = _FENCE.fullmatch(line)
        if fence is None:
            plain.append(line)
            continue
        done += _escape(plain)
        plain = []
        done += _fenced(fence[1] or fence[3], (fence[2] or fence[4] or "").strip(), lines)
    return "\n".join([*done, *_escape(plain)])


def _fenced(fence: str, language: str, lines: Iterator[str]) -> list[str]:
    """A code block in new fences. Takes its lines from `lines`, up to the line that closes `fence`."""
    closing = re.compile(rf" {{0,3}}{fence[0]}{{{len(fence)},}}[ \t]*")
    code = list(itertools.takewhile(lambda line: closing.fullmatch(line) is None, lines))
    longest = max((len(run) for line in code for run in re.findall("`+", line)), default=0)
    ticks = "`" * max(3, longest + 1)
    known = _LANGUAGE.match(language)
    return [f"{ticks}{known[0] if known else ''}", *code, ticks]


def _escape(lines: list[str]) -> list[str]:
    """Escapes tags and fences in Markdown without fenced code, and makes code elements of code spans."""
    if not lines:
        return []
    pieces = _CODE_SPAN.split("\n".join(lines))
    done = []
    for plain, code in zip(pieces[::3], [*pieces[2::3], ""], strict=True):
        text = plain.replace("&", "&amp;").replace("<", "&lt;")
        done.append(text.replace("```", "``&#96;").replace("~~~", "~~&#126;"))
        if code:
            done.append(f"<code>{''.join(map(_entity, code))}</code>")
    return ["".join(done)]


def _entity(character: str) -> str:
    """A character written so that neither Markdown nor HTML gives it a meaning."""
    return character if character.isalnum() or character == " " else f"&#{ord(character)};"
