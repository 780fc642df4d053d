"""Types of request fields that are restricted to values that change nothing, and of fields with special values."""

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from lmfusion.utils.config_values import truncate

MAX_SEED = 2**63 - 1


class Restricted:
    """Annotates a field that may be null or a value that `is_allowed` accepts.

    Args:
        is_allowed: whether a value is accepted.
        allowed: the accepted values, for error messages.
        schema: the accepted values as JSON Schema.
    """

    def __init__(self, is_allowed: Callable[[Any], bool], allowed: str, schema: dict[str, Any]) -> None:
        self._is_allowed = is_allowed
        self._allowed = allowed
        self._schema = schema

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return self._schema

    def _check(self, value: Any) -> Any:
        if value is not None and not self._is_allowed(value):
            given = json.dumps(value, ensure_ascii=False, default=str)
            raise PydanticCustomError(
                "unsupported_value",
                "must be {allowed}, got {given}; leave the field out",
                {"given": truncate(given, 80), "allowed": self._allowed},
            )
        return value


class Only(Restricted):
    """Annotates a field that may be null or one of `values`, which change nothing."""

    def __init__(self, *values: Any) -> None:
        allowed = " or ".join(json.dumps(value) for value in values) or "null"
        self._values = values
        super().__init__(self._is_listed, allowed, {"enum": [*values, None]})

    def _is_listed(self, given: Any) -> bool:
        # In Python True == 1, in JSON they differ.
        return any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in self._values)


def _has_no_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(type(bias) in (int, float) and bias == 0 for bias in value.values())


def _has_text(value: Any) -> bool:
    return isinstance(value, list) and "text" in value and all(item in ("text", "image") for item in value)


NO_BIAS = Restricted(
    _has_no_bias, "{} or a bias of 0", {"type": ["object", "null"], "additionalProperties": {"const": 0}}
)
WITH_TEXT = Restricted(
    _has_text,
    '["text"] or ["text", "image"]',
    {"type": ["array", "null"], "items": {"enum": ["text", "image"]}, "contains": {"const": "text"}},
)
IgnoredField = Annotated[Any, WithJsonSchema({})]
"""Any value is accepted and has no effect."""


def _minus_one_is_none(value: Any) -> Any:
    return None if value == -1 and type(value) is int else value


MaxTokens = Annotated[int | None, BeforeValidator(_minus_one_is_none)]
"""-1 means the server's default, as in LM Studio and llama.cpp."""
TopK = Annotated[int | None, BeforeValidator(lambda value: 0 if value == -1 and type(value) is int else value)]
"""-1 means all, as in vLLM and llama.cpp."""
Seed = Annotated[
    Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED), AfterValidator(lambda seed: seed % (MAX_SEED + 1))] | None,
    BeforeValidator(_minus_one_is_none),
]
"""-1 means the default, as in vLLM and llama.cpp. Other negative seeds are ordinary seeds."""
