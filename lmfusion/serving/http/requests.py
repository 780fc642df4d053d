"""Turns request bodies into prompts and options, and checks all limits before anything large is allocated."""

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
from lmfusion.serving.http.schema import SAME_NAMES, ChatMessage, ChatRequest, ImagePart, TextPart, parse_request
from lmfusion.utils.config_values import truncate

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

DEFAULT_MAX_TOKENS = 256
DEFAULT_MAX_IMAGES = 4
MAX_CHARS_PER_TOKEN = 16
"""Characters per token of the context. Longer texts are refused before tokenization, as they cannot fit."""
DATA_URL = re.compile(r"\s*data:([^,;]{0,100})((?:;[^,;]{0,100}){0,10}),", re.IGNORECASE)
"""Media type, parameters and "base64" (RFC 2397)."""
MEDIA_TYPES = {
    *("image/png", "image/x-png", "image/jpeg", "image/jpg", "image/pjpeg", "image/webp", "image/*"),
    "application/octet-stream",
}
"""The format of an image is read from its bytes, whatever its media type says."""
THINKING = "enable_thinking"
URL_SAFE = bytes.maketrans(b"-_", b"+/")
ESCAPES = dict(
    [(b"%2B", b"+"), (b"%2b", b"+"), (b"%2F", b"/"), (b"%2f", b"/"), (b"%3D", b"="), (b"%3d", b"=")]
    + [(newline, b"") for newline in (b"%0A", b"%0a", b"%0D", b"%0d", b"%20")]
)
"""Percent-escapes of base64 and its line breaks. Decoding all possible escapes would be slow in long texts."""
OPENAI_NAMES = {
    option.name: option.request_name for option in OPTIONS.values() if option.request_name not in (None, option.name)
}
"""Generation options that have another name in a request."""


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Limits of one request."""

    max_body_bytes: int = 16 * 1024 * 1024
    max_text_chars: int = 1_000_000
    """Total length of all messages and the negative prompt. The model's context is usually a lower limit."""
    max_image_pixels: int = 16 * 1024 * 1024
    """Pixels of each image in the prompt, before it is scaled to the model's size."""
    generation: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_text_chars", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class RequestParser:
    """Turns bodies into prompts and options for one model. Any thread may call it.

    Args:
        model: the model that answers.
        model_name: the name of the model in requests.
        limits: limits of one request.
        defaults: values of fields that a request leaves out (the command line's `--default`).

    Raises:
        ValueError: if a request with `defaults` would be refused.
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
        self._defaults: dict[str, Any] = {
            "max_tokens": min(DEFAULT_MAX_TOKENS, limits.generation.max_new_tokens),
            "max_images": min(DEFAULT_MAX_IMAGES, limits.generation.max_images),
            "num_steps": min(GenerationOptions.num_steps, limits.generation.max_num_steps),
        }
        try:
            self._set_defaults(defaults or {})
        except ApiError as error:
            raise ValueError(f"invalid default for requests: {error.message}") from None

    def parse(self, body: bytes) -> Generator[None, None, tuple[ChatRequest, Prompt, GenerationOptions]]:
        """Parse a JSON body. The generator yields before each step that takes long, such as decoding an image.

        Raises:
            ApiError: if the request cannot be answered.
        """
        request = parse_request(body)
        del body
        if request.model is not None:
            self.check_model(request.model)
        num_images = sum(isinstance(part, ImagePart) for message in request.messages for part in _parts(message))
        options = self._options(request, num_images)
        num_chars = len(request.negative_prompt or "") + sum(
            len(part.text) for message in request.messages for part in _parts(message) if isinstance(part, TextPart)
        )
        if num_chars > self._max_chars:
            message = f"the messages must have at most {self._max_chars} characters, got {num_chars}"
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        messages = []
        for i, given in enumerate(request.messages):
            messages.append((yield from self._message(given, i)))
        yield
        try:
            prompt = encode_prompt(self._model, messages, template_variables=options.template_variables)
        except ValueError as error:
            raise options_error(error, param="messages") from None
        return request, prompt, options

    def check_model(self, name: str) -> None:
        """Raise ApiError (404) if `name` is not the name of the model."""
        if name != self.model_name:
            message = f"model must be {self.model_name!r}, got {name!r}; leave it out, or see /v1/models"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _set_defaults(self, defaults: Mapping[str, Any]) -> None:
        unknown = sorted(set(defaults) - _OPTIONS)
        if unknown:
            raise ApiError(400, f"the field must be one of {', '.join(sorted(_OPTIONS))}; got {unknown[0]!r}")
        request = parse_request(json.dumps({"messages": [{"role": "user", "content": ""}], **defaults}).encode())
        self._options(request, 0)
        self._defaults |= request.model_dump(exclude_none=True, include=_OPTIONS)

    def _options(self, request: ChatRequest, num_prompt_images: int) -> GenerationOptions:
        given = {**self._defaults, **request.model_dump(exclude_none=True, include=_OPTIONS)}
        if request.max_completion_tokens is not None:
            if request.max_tokens not in (None, request.max_completion_tokens):
                message = "max_tokens and max_completion_tokens must be equal, got "
                message += f"{request.max_tokens} and {request.max_completion_tokens}; leave one of them out"
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
            raise options_error(error) from None
        return options

    def _template_variables(self, request: ChatRequest) -> dict[str, Any]:
        given = request.chat_template_kwargs or {}
        if request.enable_thinking is not None:
            if given.get(THINKING, request.enable_thinking) != request.enable_thinking:
                message = f"{THINKING} and chat_template_kwargs.{THINKING} must be equal, got "
                message += f"{request.enable_thinking} and {given[THINKING]!r:.80}; leave one of them out"
                raise ApiError(400, message, param=THINKING, code="invalid_value")
            given = {**given, THINKING: request.enable_thinking}
        return {**self._defaults.get("chat_template_kwargs", {}), **given}

    def _message(self, message: ChatMessage, index: int) -> Generator[None, None, dict[str, Any]]:
        content: list[Any] = []
        for i, part in enumerate(_parts(message)):
            if isinstance(part, TextPart):
                content.append(part.text)
            else:
                yield
                is_input = message.role != "assistant"
                content.append(self._image(part.image_url.url, f"messages[{index}].content[{i}]", is_input))
        return {"role": "system" if message.role == "developer" else message.role, "content": content}

    def _image(self, url: str, where: str, is_input: bool) -> Image.Image | VisionInput:
        """The image in a data: URL, at the model's size, so that a request never holds two images of full size.

        is_input: the image comes from the user, so a vision-language model encodes it with its vision encoder.
        """
        try:
            data = parse_data_url(url)
        except NotADataUrlError:
            message = f"{where} must be a data: URL (data:image/png;base64,... with a PNG, JPEG or WEBP), got "
            message += f"{truncate(url, 40)!r}; addresses are not fetched, send the image itself"
            raise ApiError(400, message, param=where, code="invalid_image_url") from None
        except ValueError:
            raise ApiError(400, f"{where} must be valid base64", param=where, code="invalid_image") from None
        self._check_pixels(data, where)
        config = self._model.codec.config
        try:
            image = decode_image(data, where)
            if is_input and self._model.vision is not None:
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
            message = f"{where} must have at most {self.limits.max_image_pixels} pixels, got {size[0]} x {size[1]}; "
            raise ApiError(400, f"{message}scale the image down", param=where, code="image_too_large")


class NotADataUrlError(ValueError):
    """A URL is not a data: URL with an image in base64."""


def parse_data_url(url: str) -> bytes:
    """The bytes in a data: URL. Its base64 may have line breaks, no padding, the URL-safe alphabet or percent-encoding.

    Raises:
        NotADataUrlError: if `url` is not a data: URL with an image in base64.
        ValueError: if the base64 is invalid.
    """
    head = DATA_URL.match(url)
    if head is None or head[1].strip().lower() not in MEDIA_TYPES or head[2].lower().split(";")[-1].strip() != "base64":
        raise NotADataUrlError
    text = url[head.end() :].encode("ascii")
    for escaped, char in ESCAPES.items():
        text = text.replace(escaped, char)
    text = text.translate(URL_SAFE, delete=b" \t\r\n").rstrip(b"=")
    return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


def options_error(error: ValueError, param: str | None = None) -> ApiError:
    """The engine's error about a request, with the request's field names.

    param: the field at fault if the error does not begin with its name.
    """
    message = str(error)
    for name, openai_name in OPENAI_NAMES.items():
        message = re.sub(rf"\b{name}\b", openai_name, message)
    first = re.match(r"(?:unknown )?(\w+)", message)
    if first is not None and first[1] in ChatRequest.model_fields:
        param = first[1]
    return ApiError(400, message, param=param, code="invalid_value")


_OPTIONS = {*SAME_NAMES, *OPENAI_NAMES.values()}


def _parts(message: ChatMessage) -> Iterator[TextPart | ImagePart]:
    if message.parts is not None:
        yield from message.parts
    elif isinstance(message.content, str):
        yield TextPart(type="text", text=message.content)
    else:
        yield from message.content or ()
