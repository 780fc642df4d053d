"""What may a chat request contain? OpenAI's fields that have a meaning here, and ours about images.

Nothing is ignored in silence: an unknown field is an error that names it. What OpenAI's clients send as a matter of
course and cannot change an answer is taken (see `ChatRequest`); what could change it and is not supported is taken
only at the value at which it does nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from lmfusion.serve.errors import ApiError

MAX_MESSAGES = 1000
MAX_STOP_CHARS = 1000
MAX_SEED = 2**63 - 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    """A data: URL with a PNG, JPEG or WEBP in base64."""
    detail: str | None = None
    """Taken and not used: an image is read at the model's size."""


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl
    settings: dict[str, Any] | None = None
    """What an answer's image was made with; taken and not used, so that answers can be sent back as they came."""


def _part_tag(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"<{kind}>" if kind in ("text", "image_url") else None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(
        _part_tag,
        custom_error_type="part_type",
        custom_error_message='a part is {"type": "text", "text": ...} or {"type": "image_url", "image_url": ...}',
    ),
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Tag("<parts>")],
    Discriminator(lambda content: "<string>" if isinstance(content, str) else "<parts>"),
]

StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    Annotated[StopString, Tag("<string>")] | Annotated[list[StopString], Tag("<list>")],
    Discriminator(lambda stop: "<string>" if isinstance(stop, str) else "<list>"),
]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    """"developer" is "system"."""
    content: Content | None = None
    parts: list[Part] | None = None
    """Of an answer that is sent back: what counts in place of its content, as it has the images, too."""
    name: str | None = None
    """Taken and not used."""
    # Parts of OpenAI's answers that clients send back
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Taken and not used."""


class ResponseFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions. null is the same as leaving a field out."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    """OpenAI's newer name of max_tokens."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: Stop | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    max_images: int | None = None
    min_images: int | None = None
    draw_first: bool | None = None
    num_steps: int | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    negative_prompt: str | None = None
    image_size: int | None = None
    preview_every: int | None = None

    # Only at the value that changes nothing
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    store: Literal[False] | None = None

    # Taken and not used
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None


SAME_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "max_images",
    "min_images",
    "draw_first",
    "num_steps",
    "sampler",
    "guidance_scale",
    "image_guidance_scale",
    "guidance_interval",
    "guidance_rescale",
    "negative_prompt",
    "image_size",
    "preview_every",
)
"""Fields that `GenerationOptions` has by the same name."""


def parse(body: bytes) -> ChatRequest:
    """The request in a JSON body. Raises ApiError (400) that names the field at fault."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = _path(first["loc"])
        match first["type"]:
            case "json_invalid":
                raise ApiError(400, f"the body is no JSON: {first['msg']}", code="invalid_json") from None
            case "extra_forbidden":
                message, code = f"unknown field {path!r}; docs/server.md lists what is supported", "unknown_field"
            case "missing":
                message, code = f"{path} is missing", "missing_field"
            case _:
                message, code = f"{path or 'the body'}: {first['msg']}", "invalid_value"
        raise ApiError(400, message, param=path or None, code=code) from None


def _path(location: tuple[int | str, ...]) -> str:
    """messages[0].content[1].text"""
    path = ""
    for item in location:
        if isinstance(item, int):
            path += f"[{item}]"
        elif not item.startswith("<"):  # which member of a union was tried
            path += f".{item}" if path else item
    return path
