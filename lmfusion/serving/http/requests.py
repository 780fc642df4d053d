"""How does a request's body become a prompt and options? Checked against all limits before anything large is made."""

import base64
import json
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from lmfusion.generation.options import OPTIONS, GenerationOptions, Limits
from lmfusion.generation.prompt import Prompt, context_limit, encode_prompt
from lmfusion.images.preprocessing import decode_image, read_image_size
from lmfusion.model.vision import VisionInput
from lmfusion.serving.errors import ApiError
from lmfusion.serving.http.schema import SAME_NAMES, ChatRequest, ImagePart, Message, TextPart, parse
from lmfusion.utils.config_values import truncate

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

DEFAULT_MAX_TOKENS = 256
DEFAULT_MAX_IMAGES = 4
MAX_CHARS_PER_TOKEN = 16
"""For each token of the context. Longer texts are refused before tokenization: they cannot fit by far."""
DATA_URL = re.compile(r"\s*data:([^,;]{0,100})((?:;[^,;]{0,100}){0,10}),", re.IGNORECASE)
"""Media type, parameters and "base64", as in RFC 2397."""
MEDIA_TYPES = {
    *("image/png", "image/x-png", "image/jpeg", "image/jpg", "image/pjpeg", "image/webp", "image/*"),
    "application/octet-stream",
}
"""Which of the formats an image has is read from its bytes."""
THINKING = "enable_thinking"
URL_SAFE = bytes.maketrans(b"-_", b"+/")
ESCAPES = dict(
    [(b"%2B", b"+"), (b"%2b", b"+"), (b"%2F", b"/"), (b"%2f", b"/"), (b"%3D", b"="), (b"%3d", b"=")]
    + [(newline, b"") for newline in (b"%0A", b"%0a", b"%0D", b"%0d", b"%20")]
)
"""The escapes that base64 and its line breaks need. Decoding all possible escapes would be slow in long texts."""
OPENAI_NAMES = {
    option.name: option.request_name for option in OPTIONS.values() if option.request_name not in (None, option.name)
}
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
        context = context_limit(model)
        self._max_chars = (
            min(limits.max_text_chars, MAX_CHARS_PER_TOKEN * context) if context else limits.max_text_chars
        )
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

    def read(self, body: bytes) -> Generator[None, None, tuple[ChatRequest, Prompt, GenerationOptions]]:
        """What a JSON body asks for. It yields before each piece of work that takes long, such as an image.

        Raises ApiError where the request cannot be answered.
        """
        request = parse(body)
        del body
        if request.model is not None and request.model != self.model_name:
            message = f"the model {request.model!r} is not served here; this is {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        num_images = sum(isinstance(part, ImagePart) for message in request.messages for part in _parts(message))
        options = self._options(request, num_images)
        num_chars = len(request.negative_prompt or "") + sum(
            len(part.text) for message in request.messages for part in _parts(message) if isinstance(part, TextPart)
        )
        if num_chars > self._max_chars:
            message = f"the messages have {num_chars} characters; the limit here is {self._max_chars}"
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        messages = []
        for i, given in enumerate(request.messages):
            messages.append((yield from self._message(given, i)))
        yield
        try:
            prompt = encode_prompt(self._model, messages, template_variables=options.template_variables)
        except ValueError as error:
            raise from_options(error, param="messages") from None
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
        if variables := self._template_variables(request):
            values["template_variables"] = variables
        try:
            options = GenerationOptions(**values)
            self.limits.generation.check(options, num_prompt_images)
        except ValueError as error:
            raise from_options(error) from None
        return options

    def _template_variables(self, request: ChatRequest) -> dict[str, Any]:
        given = request.chat_template_kwargs or {}
        if request.enable_thinking is not None:
            if given.get(THINKING, request.enable_thinking) != request.enable_thinking:
                message = f"{THINKING} is {request.enable_thinking}, but chat_template_kwargs has "
                message += f"{given[THINKING]!r:.80}; leave one of them out"
                raise ApiError(400, message, param=THINKING, code="invalid_value")
            given = {**given, THINKING: request.enable_thinking}
        return {**self._defaults.get("chat_template_kwargs", {}), **given}

    def _message(self, message: Message, index: int) -> Generator[None, None, dict[str, Any]]:
        content: list[Any] = []
        for i, part in enumerate(_parts(message)):
            if isinstance(part, TextPart):
                content.append(part.text)
            else:
                yield
                is_shown = message.role != "assistant"
                content.append(self._image(part.image_url.url, f"messages[{index}].content[{i}]", is_shown))
        return {"role": "system" if message.role == "developer" else message.role, "content": content}

    def _image(self, url: str, where: str, is_shown: bool) -> Image.Image | VisionInput:
        """The image of a data: URL, as the model has it: full-sized ones are never held side by side.

        is_shown: whether somebody shows it to the model; a vision-language model then sees it.
        """
        try:
            data = image_bytes(url)
        except _NoDataUrl:
            message = f"{where} has the URL {truncate(url, 40)!r}; nothing is fetched here, send the image itself as a data: URL "
            message += "(data:image/png;base64,... with a PNG, JPEG or WEBP)"
            raise ApiError(400, message, param=where, code="invalid_image_url") from None
        except ValueError:
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
        with suppress(ValueError):  # decode_image reports the damage
            size = read_image_size(data, where)
        if size[0] * size[1] > self.limits.max_image_pixels:
            message = f"{where} has {size[0]} x {size[1]} pixels; the limit here is {self.limits.max_image_pixels} "
            raise ApiError(400, f"{message}in all, scale it down", param=where, code="image_too_large")


class _NoDataUrl(ValueError):  # noqa: N818
    pass


def image_bytes(url: str) -> bytes:
    """The bytes in a data: URL. Its base64 may have line breaks, no padding, the URL-safe alphabet or percent-encoding.

    Raises _NoDataUrl if `url` is not a data: URL of an image in base64, ValueError for invalid base64.
    """
    head = DATA_URL.match(url)
    if head is None or head[1].strip().lower() not in MEDIA_TYPES or head[2].lower().split(";")[-1].strip() != "base64":
        raise _NoDataUrl
    text = url[head.end() :].encode("ascii")
    for escaped, char in ESCAPES.items():
        text = text.replace(escaped, char)
    text = text.translate(URL_SAFE, delete=b" \t\r\n").rstrip(b"=")
    return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


def from_options(error: ValueError, param: str | None = None) -> ApiError:
    """What the engine says of a request, in the words of the request. param: the field, where it names none."""
    message = str(error)
    for ours, theirs in OPENAI_NAMES.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    name = re.match(r"(?:unknown )?(\w+)", message)
    if name is not None and name[1] in ChatRequest.model_fields:
        param = name[1]
    return ApiError(400, message, param=param, code="invalid_value")


_OPTIONS = {*SAME_NAMES, *OPENAI_NAMES.values()}


def _parts(message: Message) -> Iterator[TextPart | ImagePart]:
    if message.parts is not None:
        yield from message.parts
    elif isinstance(message.content, str):
        yield TextPart(type="text", text=message.content)
    else:
        yield from message.content or ()
