"""What does a conversation look like? Turns as messages of a chat: Markdown, pictures, and pictures on their way."""

import base64
import html
import io
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from PIL import Image

from lmfusion.page.session import Drawing, Part, Picture, Turn

ENLARGED = 192
"""Pixels a side that pictures of fewer pixels are enlarged to, by a whole factor."""
MAX_PNG_SIDE = 64
"""Larger previews travel as JPEG."""

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)


def messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The value of a `gr.Chatbot`. What somebody wrote is Markdown; HTML in it is shown as it was typed."""
    return [{"role": turn.role, "content": [_text(piece) for piece in _pieces(turn)]} for turn in turns]


def picture(shown: Picture) -> str:
    """A finished picture, which the page's server gives out, as HTML."""
    words = f"Picture: {shown.settings.get('prompt', '')}" if shown.settings else "Picture from you"
    return _image(f"gradio_api/file={quote(str(shown.path))}", shown.image.width, shown.image.height, words, "picture")


def _pieces(turn: Turn) -> list[str]:
    pieces = [_piece(part) for part in turn.parts]
    if not turn.is_finished and not turn.parts:
        pieces.append('<span class="waiting" role="status">waiting for the model</span>')
    if turn.note:
        pieces.append(f'<div class="note">{html.escape(turn.note)}</div>')
    return pieces


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _piece(part: Part) -> str:
    match part:
        case Picture():
            return picture(part)
        case Drawing():
            return _drawing(part)
        case str():
            return _without_html(part)


def _drawing(drawing: Drawing) -> str:
    words = f"step {drawing.step} of {drawing.num_steps}"
    if drawing.preview is None:
        style = f"width:{_shown(drawing.width, drawing.height)[0]}px; aspect-ratio:{drawing.width}/{drawing.height}"
        picture = f'<div class="blank" style="{style}"></div>'
    else:
        source = _data_uri(drawing.preview)
        picture = _image(source, drawing.width, drawing.height, f"Preview, {words}", "preview")
    if drawing.is_stopped:
        return f'{picture}<div class="note">stopped at {words}</div>'
    return f'{picture}<progress value="{drawing.step}" max="{drawing.num_steps}" aria-label="{words}"></progress>'


def _image(source: str, width: int, height: int, words: str, kind: str) -> str:
    shown_width, shown_height = _shown(width, height)
    kind += " pixelated" if shown_width > width else ""
    return (
        f'<img class="{kind}" src="{source}" alt="{html.escape(words)}" '
        f'style="width:{shown_width}px; aspect-ratio:{shown_width}/{shown_height}">'
    )


def _shown(width: int, height: int) -> tuple[int, int]:
    """Pixels on the page: tiny pictures are enlarged by a whole factor."""
    factor = max(1, ENLARGED // max(width, height))
    return width * factor, height * factor


def _data_uri(image: Image.Image) -> str:
    kind = "PNG" if max(image.size) <= MAX_PNG_SIDE else "JPEG"
    file = io.BytesIO()
    image.save(file, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _without_html(text: str) -> str:
    """Markdown in which tags are letters; inside code they are that anyway."""
    return "".join(
        piece if i % 2 else piece.replace("&", "&amp;").replace("<", "&lt;")
        for i, piece in enumerate(_CODE.split(text))
    )
