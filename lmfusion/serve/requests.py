"""How does a request's body become a prompt and options? Checked against all limits before anything large is made."""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from lmfusion.generation.options import GenerationOptions, Limits
from lmfusion.generation.prompt import Prompt, encode_prompt
from lmfusion.image.preprocessing import decode_image, read_image_size
from lmfusion.serve.errors import ApiError
from lmfusion.serve.schema import SAME_NAMES, ChatRequest, ImagePart, Message, TextPart, parse
from lmfusion.vision import VisionInput

if TYPE_CHECKING:
    from lmfusion.modeling import LMFusion

DEFAULT_MAX_TOKENS = 256
DEFAULT_MAX_IMAGES = 4
DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)
OPENAI_NAMES = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}
"""What the options of generation are called in a request."""


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may contain at most."""

    max_body_bytes: int = 16 * 1024 * 1024
    max_text_chars: int = 1_000_000
    """Of all messages and the negative prompt; the model's context is usually less."""
    max_image_pixels: int = 16 * 1024 * 1024
    """Of each image in the prompt, before it is scaled to the model's size."""
    generation: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_text_chars", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class RequestReader:
    """Turns bodies into prompts and options for one model. Any thread may call it.

    model_name: what requests call the model. defaults: fields of a request that are not given; of the command line's
    `--default`. Raises ValueError for defaults that no request could have, or beyond the limits.
    """

    def __init__(
        self,
        model: "LMFusion",
        model_name: str,
        limits: RequestLimits = RequestLimits(),
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.model_name = model_name
        self.limits = limits
        self._model = model
        most = limits.generation
        self._defaults: dict[str, Any] = {
            "max_tokens": min(DEFAULT_MAX_TOKENS, most.max_new_tokens),
            "max_images": min(DEFAULT_MAX_IMAGES, most.max_images),
            "num_steps": min(GenerationOptions.num_steps, most.max_num_steps),
        }
        try:
            self._set_defaults(defaults or {})
        except ApiError as error:
            raise ValueError(f"a request's default cannot be used: {error.message}") from None

    def read(self, body: bytes) -> tuple[ChatRequest, Prompt, GenerationOptions]:
        """What a JSON body asks for. Raises ApiError where it cannot be answered."""
        request = parse(body)
        if request.model is not None and request.model != self.model_name:
            message = f"the model {request.model!r} is not served here; this is {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        num_images = sum(isinstance(part, ImagePart) for message in request.messages for part in _parts(message))
        options = self._options(request, num_images)
        num_chars = len(request.negative_prompt or "") + sum(
            len(part.text) for message in request.messages for part in _parts(message) if isinstance(part, TextPart)
        )
        if num_chars > self.limits.max_text_chars:
            message = f"the messages have {num_chars} characters; the limit here is {self.limits.max_text_chars}"
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        messages = [self._message(message, i) for i, message in enumerate(request.messages)]
        try:
            prompt = encode_prompt(self._model, messages)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None
        return request, prompt, options

    def _set_defaults(self, defaults: Mapping[str, Any]) -> None:
        unknown = sorted(set(defaults) - _OPTIONS)
        if unknown:
            raise ApiError(400, f"there is no field {unknown[0]!r} to set; there are {', '.join(sorted(_OPTIONS))}")
        request = parse(json.dumps({"messages": [{"role": "user", "content": ""}], **defaults}).encode())
        self._options(request, 0)
        self._defaults |= request.model_dump(exclude_none=True, include=_OPTIONS)

    def _options(self, request: ChatRequest, num_prompt_images: int) -> GenerationOptions:
        given = {**self._defaults, **request.model_dump(exclude_none=True, include=_OPTIONS)}
        if request.max_completion_tokens is not None:
            if request.max_tokens not in (None, request.max_completion_tokens):
                message = f"max_tokens is {request.max_tokens}, but max_completion_tokens "
                message += f"{request.max_completion_tokens}; they mean the same, leave one of them out"
                raise ApiError(400, message, param="max_completion_tokens", code="invalid_value")
            given["max_tokens"] = request.max_completion_tokens
        if "min_images" in given and request.max_images is None:
            given["max_images"] = max(given["max_images"], given["min_images"])
        stop = given.get("stop", ())
        values = {name: given[name] for name in SAME_NAMES if name in given}
        values.update(
            max_new_tokens=given["max_tokens"], stop_strings=(stop,) if isinstance(stop, str) else tuple(stop)
        )
        try:
            options = GenerationOptions(**values)
            self.limits.generation.check(options, num_prompt_images)
        except ValueError as error:
            raise from_options(error) from None
        return options

    def _message(self, message: Message, index: int) -> dict[str, Any]:
        content: list[Any] = []
        for i, part in enumerate(_parts(message)):
            if isinstance(part, TextPart):
                content.append(part.text)
            else:
                is_shown = message.role != "assistant"
                content.append(self._image(part.image_url.url, f"messages[{index}].content[{i}]", is_shown))
        return {"role": "system" if message.role == "developer" else message.role, "content": content}

    def _image(self, url: str, where: str, is_shown: bool) -> Image.Image | VisionInput:
        """The image of a data: URL, as the model has it: full-sized ones are never held side by side.

        is_shown: whether somebody shows it to the model; a vision-language model then sees it.
        """
        head = DATA_URL.match(url)
        if head is None:
            shown = url if len(url) <= 40 else f"{url[:40]}..."
            message = f"{where} has the URL {shown!r}; nothing is fetched here, send the image itself as a data: URL "
            message += "(data:image/png;base64,... with a PNG, JPEG or WEBP)"
            raise ApiError(400, message, param=where, code="invalid_image_url")
        try:
            data = base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(400, f"{where} is no valid base64", param=where, code="invalid_image") from None
        self._check_pixels(data, where)
        config = self._model.codec.config
        try:
            image = decode_image(data, where)
            if is_shown and self._model.vision is not None:
                return self._model.vision.prepare(image)
            image = image.convert("L" if config.channels == 1 else "RGB")
        except ValueError as error:
            raise ApiError(400, str(error), param=where, code="invalid_image") from None
        return ImageOps.fit(image, (config.image_size, config.image_size), Image.Resampling.BICUBIC)

    def _check_pixels(self, data: bytes, where: str) -> None:
        size = (0, 0)
        with suppress(ValueError):  # decode_image names faults
            size = read_image_size(data, where)
        if size[0] * size[1] > self.limits.max_image_pixels:
            message = f"{where} has {size[0]} x {size[1]} pixels; the limit here is {self.limits.max_image_pixels} "
            raise ApiError(400, f"{message}in all, scale it down", param=where, code="image_too_large")


def from_options(error: ValueError) -> ApiError:
    """What the engine says of a request, in the words of the request."""
    message = str(error)
    for ours, theirs in OPENAI_NAMES.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    name = re.match(r"(?:unknown )?(\w+)", message)
    param = name[1] if name is not None and name[1] in ChatRequest.model_fields else None
    return ApiError(400, message, param=param, code="invalid_value")


_OPTIONS = {*SAME_NAMES, "max_tokens", "stop"}


def _parts(message: Message) -> Iterator[TextPart | ImagePart]:
    if message.parts is not None:
        yield from message.parts
    elif isinstance(message.content, str):
        yield TextPart(type="text", text=message.content)
    else:
        yield from message.content or ()
