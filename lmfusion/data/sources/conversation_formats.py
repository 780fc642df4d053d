"""Conversations as OpenAI, transformers, LLaVA and ShareGPT write them in JSON, read as roles, texts and images.

{"messages": [{"role": "user", "content": [{"type": "text", "text": "What is this?"},
                                           {"type": "image_url", "image_url": {"url": "cats/1.jpg"}}]}, ...]}
{"image": "cats/1.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, ...]}
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from lmfusion.text.chat import ROLES
from lmfusion.utils.config_values import short_repr

KEYS = ("messages", "conversations")
"""Where a line has its list of messages."""
PLACEHOLDER = "<image>"
"""What stands for the next image of the line's `image` or `images` in a text."""
_ROLES = {role: role for role in ROLES} | {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_SOURCES = ("image", "image_url", "url", "path")
"""Keys of an image part that say where the image is."""


class ImageReference(NamedTuple):
    """Where an image is: a path relative to the file, or a data URL."""

    address: str


Part = str | ImageReference


def read_conversation(entry: dict[str, Any]) -> list[tuple[str, list[Part]]]:
    """The (role, parts) of every message of a line that has one of KEYS. Roles are those of `lmfusion.text.chat`.

    The line may name its images in `image` or `images`. Then each "<image>" in a text, and each image part without an
    address of its own, stands for the next of them. Raises ValueError, saying what is wrong, for anything that is not
    understood, for images that do not match their places, and for what would have to be learned and cannot be: tool
    calls, and messages of weight 0.
    """
    if entry.get("tools") or entry.get("functions"):
        raise ValueError("the line has tools; conversations with tool calls cannot be learned, leave the line out")
    images = _images_of(entry)
    key = next(key for key in KEYS if key in entry)
    if images is None and key == "conversations":  # in these a placeholder is never a text
        images = []
    remaining = None if images is None else iter(images)
    messages = [_message(item, remaining) for item in entry[key]]
    if isinstance(entry.get("system"), str):
        messages.insert(0, ("system", [entry["system"]]))
    if remaining is not None and (num_left := sum(1 for _ in remaining)):
        raise ValueError(
            f"the line names {len(images or [])} images, and its texts have places for {len(images or []) - num_left}; "
            f'write "{PLACEHOLDER}" where each image stands'
        )
    return messages


def _images_of(entry: dict[str, Any]) -> list[ImageReference] | None:
    """The images that a line names beside its messages; None where it names none."""
    keys = [key for key in ("image", "images") if entry.get(key) not in (None, "")]
    if not keys:
        return None
    if len(keys) > 1:
        raise ValueError("the line has both image and images; name its images in one of them")
    value = entry[keys[0]]
    return [_reference(item, keys[0]) for item in (value if isinstance(value, list) else [value])]


def _message(item: Any, images: Iterator[ImageReference] | None) -> tuple[str, list[Part]]:
    if isinstance(item, dict):
        item = {key: value for key, value in item.items() if value is not None}
    role = item.get("role", item.get("from")) if isinstance(item, dict) else None
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"every message must have a role, one of {', '.join(_ROLES)}; got {short_repr(item)}")
    if item.get("tool_calls") or item.get("function_call"):
        raise ValueError("a message has tool calls, which cannot be learned; leave the line out")
    if item.get("weight", 1) != 1:
        raise ValueError(f"a message has weight {short_repr(item['weight'])}; the weight must be 1, or be left out")
    content = item.get("content", item.get("value"))
    if not isinstance(content, str | list):
        raise ValueError(f"the content of the {role}'s message must be a text, or a list of texts and images")
    return _ROLES[role], read_content([content] if isinstance(content, str) else content, images)


def read_content(content: list[Any], images: Iterator[ImageReference] | None = None) -> list[Part]:
    """The texts and images of a list of parts. images: what placeholders stand for, None where there are none.

    Raises ValueError for a part that is not understood.
    """
    return [part for item in content for part in _parts(item, images)]


def _parts(item: Any, images: Iterator[ImageReference] | None) -> list[Part]:
    kind = item.get("type") if isinstance(item, dict) else None
    if isinstance(item, str) or (kind in _TEXT_TYPES and isinstance(item.get("text"), str)):
        text = item if isinstance(item, str) else item["text"]
        return [text] if images is None else _with_images(text, images)
    if isinstance(item, dict) and kind in (*_IMAGE_TYPES, None):
        source = next((item[key] for key in _SOURCES if item.get(key) is not None), None)
        if source is not None:
            return [_reference(source, "an image of the content")]
        if kind in _IMAGE_TYPES and images is not None:
            return [_next(images)]
    raise ValueError(
        'content must hold texts, {"image": "path"}, {"type": "text", "text": ...} and {"type": "image_url", '
        f'"image_url": {{"url": ...}}}}; got {short_repr(item)}'
    )


def _with_images(text: str, images: Iterator[ImageReference]) -> list[Part]:
    """`text` with the next images in the places of its placeholders."""
    first, *others = text.split(PLACEHOLDER)
    parts: list[Part] = [first]
    for other in others:
        parts += [_next(images), other]
    return parts


def _next(images: Iterator[ImageReference]) -> ImageReference:
    found = next(images, None)
    if found is None:
        raise ValueError("the conversation has places for more images than the line names")
    return found


def _reference(value: Any, name: str) -> ImageReference:
    """The image that a path, a data URL, or an object with one of them names."""
    if isinstance(value, dict):
        value = next((value[key] for key in _SOURCES if isinstance(value.get(key), str)), None)
    if not isinstance(value, str):
        raise ValueError(f"{name} must name an image by a path or a data URL")
    return ImageReference(value)
