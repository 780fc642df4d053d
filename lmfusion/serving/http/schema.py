"""The schema of chat requests: OpenAI's fields, and fields for image generation.

Nothing is ignored silently: an unknown field is an error that names it. All of OpenAI's fields are known. Fields that
cannot change an answer are accepted; unsupported fields that could are accepted at values that change nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from lmfusion.generation.options import OPTIONS
from lmfusion.serving.errors import ApiError
from lmfusion.serving.http.fields import NO_BIAS, WITH_TEXT, IgnoredField, MaxTokens, Only, Seed, TopK

MAX_MESSAGES = 1000
MAX_PARTS = 1000
MAX_VALUES = 50_000
"""JSON values in a body. Validation takes time and memory for each, and makes an error for each that is wrong."""
MAX_STOP_CHARS = 1000
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some clients send it at the start of a body."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str
    # Prompt caching, which this server does not have
    prompt_cache_breakpoint: IgnoredField = None
    cache_control: IgnoredField = None


class ImageUrl(_Strict):
    url: str
    """A data: URL with a PNG, JPEG or WEBP in base64."""
    detail: str | None = None
    """Accepted and ignored: an image is scaled to the model's size."""


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(lambda url: {"url": url} if isinstance(url, str) else url)]
    """An object with a url, or the URL alone, as some clients send it."""
    settings: dict[str, Any] | None = None
    """The settings of a generated image. Accepted and ignored, so that answers can be sent back unchanged."""
    prompt_cache_breakpoint: IgnoredField = None
    cache_control: IgnoredField = None


def _part_tag(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"<{kind}>" if kind in ("text", "image_url") else None


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(
        _part_tag,
        custom_error_type="part_type",
        custom_error_message='a part must be {"type": "text", "text": ...} or {"type": "image_url", "image_url": ...}',
    ),
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[ContentPart], Field(max_length=MAX_PARTS), Tag("<parts>")],
    Discriminator(lambda content: "<string>" if isinstance(content, str) else "<parts>"),
]

StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    Annotated[StopString, Tag("<string>")] | Annotated[list[StopString], Tag("<list>")],
    Discriminator(lambda stop: "<string>" if isinstance(stop, str) else "<list>"),
]


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    """"developer" means "system"."""
    content: Content | None = None
    parts: Annotated[list[ContentPart], Field(max_length=MAX_PARTS)] | None = None
    """The parts of an answer that is sent back. They replace its content, since they include the images."""
    name: str | None = None
    """Accepted and ignored."""
    cache_control: IgnoredField = None
    # Fields of answers that clients send back
    refusal: Annotated[Any, Only("")] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None
    tool_calls: Annotated[Any, Only([])] = None
    tool_call_id: Annotated[Any, Only("")] = None
    reasoning_content: Annotated[Any, Only("")] = None
    reasoning: Annotated[Any, Only("")] = None
    annotations: IgnoredField = None


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted and ignored."""


class ResponseFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions. null is the same as leaving a field out."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = None
    max_tokens: MaxTokens = None
    max_completion_tokens: MaxTokens = None
    """OpenAI's newer name of max_tokens."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: TopK = None
    stop: Stop | None = None
    seed: Seed = None
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

    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, which override those of the server and the model. vLLM's and llama.cpp's name."""
    enable_thinking: bool | None = None
    """The chat template's variable of that name."""

    # OpenAI's fields, at values that change nothing
    n: Annotated[Any, Only(1)] = None
    presence_penalty: Annotated[Any, Only(0)] = None
    frequency_penalty: Annotated[Any, Only(0)] = None
    logprobs: Annotated[Any, Only(False)] = None
    top_logprobs: Annotated[Any, Only(0)] = None
    logit_bias: Annotated[Any, NO_BIAS] = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[Any, WITH_TEXT] = None
    audio: Annotated[Any, Only()] = None
    reasoning_effort: Annotated[Any, Only("none", "medium")] = None
    verbosity: Annotated[Any, Only("medium")] = None
    store: Annotated[Any, Only(False)] = None
    moderation: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    tools: list[Any] | None = None
    """Must be empty unless `tool_choice` is "none"."""
    functions: list[Any] | None = None
    """Must be empty unless `function_call` is "none"."""

    # OpenAI's fields that are accepted and ignored
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    """It could only make the answer faster."""

    # Fields of vLLM and llama.cpp, at values that change nothing
    min_p: Annotated[Any, Only(0)] = None
    typical_p: Annotated[Any, Only(1)] = None
    repetition_penalty: Annotated[Any, Only(1)] = None
    repeat_penalty: Annotated[Any, Only(1)] = None
    length_penalty: Annotated[Any, Only(1)] = None
    mirostat: Annotated[Any, Only(0)] = None
    best_of: Annotated[Any, Only(1)] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    min_tokens: Annotated[Any, Only(0)] = None
    ignore_eos: Annotated[Any, Only(False)] = None
    stop_token_ids: Annotated[Any, Only([])] = None
    bad_words: Annotated[Any, Only([])] = None
    include_stop_str_in_output: Annotated[Any, Only(False)] = None
    skip_special_tokens: Annotated[Any, Only(True)] = None
    spaces_between_special_tokens: Annotated[Any, Only(True)] = None
    add_special_tokens: Annotated[Any, Only(False)] = None
    add_generation_prompt: Annotated[Any, Only(True)] = None
    continue_final_message: Annotated[Any, Only(False)] = None
    echo: Annotated[Any, Only(False)] = None
    cache_prompt: bool | None = None
    """It could only make the answer faster."""


SAME_NAMES = tuple(option.name for option in OPTIONS.values() if option.request_name == option.name)
"""Fields that `GenerationOptions` has by the same name."""


def parse_request(body: bytes) -> ChatRequest:
    """The request in a JSON body.

    Raises:
        ApiError: 400, with the field at fault.
    """
    if has_many_values(body):
        message = (
            f"the body must have at most {MAX_VALUES} JSON values, got more; send fewer messages, parts or list items"
        )
        raise ApiError(400, message, code="too_many_values")
    try:
        request = ChatRequest.model_validate_json(body.removeprefix(BYTE_ORDER_MARK))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = _path(first["loc"])
        match first["type"]:
            case "json_invalid":
                raise ApiError(400, f"the body must be JSON: {first['msg']}", code="invalid_json") from None
            case "extra_forbidden":
                message, code = f"unknown field {path!r}; docs/serving.md lists the supported ones", "unknown_field"
            case "missing":
                message, code = f"{path} is missing", "missing_field"
            case "unsupported_value":
                message, code = f"{path} {first['msg']}", "unsupported_value"
            case _:
                message, code = f"{path or 'the body'}: {first['msg']}", "invalid_value"
        raise ApiError(400, message, param=path or None, code=code) from None
    for field, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if getattr(request, field) and getattr(request, choice) != "none":
            message = f'{field} must be empty unless {choice} is "none"; tools are not supported'
            raise ApiError(400, message, param=field, code="unsupported_value")
    return request


def has_many_values(body: bytes) -> bool:
    """Whether JSON text has more than MAX_VALUES values, found without parsing it."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # the quotes that remain begin and end strings
    if plain.count(b'"') > 4 * MAX_VALUES:  # a name and a value have four
        return True
    return sum(part.count(b",") for part in plain.split(b'"')[::2]) > MAX_VALUES


def _path(location: tuple[int | str, ...]) -> str:
    """messages[0].content[1].text"""
    path = ""
    for item in location:
        if isinstance(item, int):
            path += f"[{item}]"
        elif not item.startswith("<"):  # the member of a union that pydantic tried
            path += f".{item}" if path else item
    return path
