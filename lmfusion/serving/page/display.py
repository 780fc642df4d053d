"""What does a conversation look like? Turns as messages of a chat: Markdown, pictures, and pictures on their way."""

import base64
import html
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from PIL import Image

from lmfusion.serving.page.session import Drawing, Part, Picture, Turn

ENLARGED = 192
"""Pixels a side that pictures of fewer pixels are enlarged to, by a whole factor."""
MAX_PNG_SIDE = 64
"""Larger previews travel as JPEG."""

_LINE = re.compile(r"\r\n|\r|\n")
_FENCE = re.compile(r" {0,3}(?:(`{3,})([^`]*)|(~{3,})(.*))")
_LANGUAGE = re.compile(r"[\w+#.-]*")
_CODE_SPAN = re.compile(r"(?<![\\`])(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


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
    """Markdown in which tags are letters.

    A "<" stays one only inside fenced code, whose fences are written anew so that every renderer sees them begin and
    end in the same lines. What is code within a line depends on the renderer, so it becomes a code element here.
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
    """A block of code in fences of its own, its lines taken from `lines` up to the one that closes `fence`."""
    closing = re.compile(rf" {{0,3}}{fence[0]}{{{len(fence)},}}[ \t]*")
    code = list(itertools.takewhile(lambda line: closing.fullmatch(line) is None, lines))
    longest = max((len(run) for line in code for run in re.findall("`+", line)), default=0)
    ticks = "`" * max(3, longest + 1)
    known = _LANGUAGE.match(language)
    return [f"{ticks}{known[0] if known else ''}", *code, ticks]


def _escape(lines: list[str]) -> list[str]:
    """Lines of Markdown without fenced code: tags and fences as letters, code spans as code elements."""
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
    """A character that neither Markdown nor HTML reads as anything but itself."""
    return character if character.isalnum() or character == " " else f"&#{ord(character)};"
