"""Tests all fields of OpenAI's chat requests: values that change nothing are accepted, others are named.

The fields are those of CompletionCreateParams and the message types in openai 3.57.0.
"""

import base64
import io
import json
import re
import time
from urllib.parse import quote

import numpy as np
import pytest

from lmfusion.serving.errors import ApiError
from lmfusion.serving.http.requests import RequestParser, parse_data_url
from lmfusion.serving.http.schema import MAX_VALUES, ChatMessage, ChatRequest, TextPart, parse_request
from tests.lmfusion.serving.conftest import data_url, image_of, image_part, picture

CALL = {"name": "f", "arguments": "{}"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TEXT = {"type": "text", "text": "x"}

ACCEPTED = {
    "audio": [None],
    "frequency_penalty": [None, 0, 0.0, -0.0],
    "function_call": [None, "none", "auto"],
    "functions": [None, []],
    "logit_bias": [None, {}, {"50256": 0}, {"1": 0.0, "2": 0}],
    "logprobs": [None, False],
    "max_completion_tokens": [None, 256, -1],
    "max_tokens": [None, 256, -1],
    "metadata": [None, {}, {"a": "b"}],
    "modalities": [None, ["text"], ["text", "image"], ["image", "text"]],
    "model": [None, "tiny"],
    "moderation": [None],
    "n": [None, 1],
    "parallel_tool_calls": [None, True, False],
    "prediction": [None, {"type": "content", "content": "x"}, {"type": "content", "content": [TEXT]}],
    "presence_penalty": [None, 0, 0.0],
    "prompt_cache_key": [None, "", "k"],
    "prompt_cache_options": [None, {}, {"mode": "implicit", "ttl": "30m"}],
    "prompt_cache_retention": [None, "in_memory", "24h"],
    "reasoning_effort": [None, "none", "medium"],
    "response_format": [None, {"type": "text"}],
    "safety_identifier": [None, "me"],
    "seed": [None, 0, -1],
    "service_tier": [None, "auto", "default", "flex", "scale", "priority", "fast"],
    "stop": [None, []],
    "store": [None, False],
    "stream": [None, False],
    "stream_options": [None, {}, {"include_usage": None, "include_obfuscation": False}, {"include_usage": False}],
    "temperature": [None, 0, 0.0],
    "tool_choice": [None, "none", "auto"],
    "tools": [None, []],
    "top_logprobs": [None, 0],
    "top_p": [None, 1, 1.0],
    "user": [None, "", "me"],
    "verbosity": [None, "medium"],
    "web_search_options": [None],
}
OTHERS_ACCEPTED = {
    "top_k": [None, 0, -1],
    "min_p": [0, 0.0],
    "typical_p": [1],
    "repetition_penalty": [1, 1.0],
    "repeat_penalty": [1.0],
    "length_penalty": [1.0],
    "mirostat": [0],
    "best_of": [1],
    "use_beam_search": [False],
    "min_tokens": [0],
    "ignore_eos": [False],
    "stop_token_ids": [[]],
    "bad_words": [[]],
    "include_stop_str_in_output": [False],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "add_special_tokens": [False],
    "add_generation_prompt": [True],
    "continue_final_message": [False],
    "echo": [False],
    "cache_prompt": [True, False],
}
REFUSED = {
    "audio": [{"voice": "alloy", "format": "wav"}],
    "frequency_penalty": [0.5, -2, True],
    "function_call": [{"name": "f"}],
    "functions": [[{"name": "f"}]],
    "logit_bias": [{"1": 5}, {"1": False}, []],
    "logprobs": [True, 0],
    "metadata": ["a"],
    "modalities": [["text", "audio"], ["audio"], [], "text"],
    "moderation": [{"model": "omni-moderation-latest"}],
    "n": [2, 0, True, 1.5],
    "prediction": ["x"],
    "presence_penalty": [1],
    "reasoning_effort": ["minimal", "low", "high", "xhigh", "max", "HIGH"],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
    "seed": [2**63, -(2**63) - 1, 1.5, "1"],
    "store": [True],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "tools": [[TOOL]],
    "top_logprobs": [5, False],
    "verbosity": ["low", "high"],
    "web_search_options": [{}, {"search_context_size": "low"}],
    "min_p": [0.1],
    "repetition_penalty": [1.1],
    "stop_token_ids": [[2]],
    "skip_special_tokens": [False],
    "top_k": [-2],
    "max_tokens": [-2],
}


@pytest.fixture(scope="module")
def parser(model):
    return RequestParser(model, "tiny")


def read(parser, body=None, **fields):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields} if body is None else body
    steps = parser.parse(json.dumps(body).encode() if isinstance(body, dict) else body)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def meaning(parser, body=None, **fields):
    """The parsed request, with pixels as numbers."""
    request, prompt, options = read(parser, body, **fields)
    parts = [np.asarray(part).tolist() if not isinstance(part, list) else part for part in prompt.parts]
    return parts, options, bool(request.stream)


def values(table):
    return [pytest.param(name, value, id=f"{name}={json.dumps(value)[:30]}") for name in table for value in table[name]]


def test_all_fields_are_in_the_tables():
    """All of OpenAI's fields are known. Fields for images have tests of their own."""
    openai = set(ACCEPTED) | {"messages"}
    assert len(openai) == 37 and openai <= set(ChatRequest.model_fields)
    own = {name for name in ChatRequest.model_fields if name not in openai and name not in OTHERS_ACCEPTED}
    assert own == {
        *("max_images", "min_images", "draw_first", "num_steps", "sampler", "guidance_scale", "image_guidance_scale"),
        *("guidance_interval", "guidance_rescale", "negative_prompt", "image_size", "preview_every"),
        *("chat_template_kwargs", "enable_thinking"),
    }


@pytest.mark.parametrize(("name", "value"), values(ACCEPTED) + values(OTHERS_ACCEPTED))
def test_values_that_change_nothing_are_accepted(parser, name, value):
    assert meaning(parser, **{name: value}) == meaning(parser)


@pytest.mark.parametrize(("name", "value"), values(REFUSED))
def test_values_that_would_change_an_answer_are_named(parser, name, value):
    with pytest.raises(ApiError) as caught:
        read(parser, **{name: value})
    error = caught.value
    assert error.status == 400 and name in error.message
    assert error.param.split(".")[0].split("[")[0] == name


@pytest.mark.parametrize(("tools", "choice"), [("tools", "tool_choice"), ("functions", "function_call")])
def test_tools_that_must_not_be_called_are_accepted(parser, tools, choice):
    assert meaning(parser, **{tools: [TOOL], choice: "none"}) == meaning(parser)
    with pytest.raises(ApiError, match=f'{tools} must be empty unless {choice} is "none"; tools are not supported'):
        read(parser, **{tools: [TOOL], choice: "auto"})


def test_negative_seeds_are_seeds(parser):
    assert [read(parser, seed=seed)[2].seed for seed in (5, -5, -(2**63))] == [5, 2**63 - 5, 0]


@pytest.mark.parametrize("stop", ["a", ["a"], ["a", "b", "c", "d"], "</s>", ["<|im_end|>", "\n\n"]])
def test_stop_strings_of_all_kinds(parser, stop):
    assert read(parser, stop=stop)[2].stop_strings == tuple([stop] if isinstance(stop, str) else stop)


def test_a_control_token_may_be_a_stop_string(server):
    assert server.post(stop=["<|im_end|>", "</s>"], max_tokens=3).status_code == 200


def test_all_harmless_fields_at_once_over_http(server):
    fields = {name: taken[-1] for table in (ACCEPTED, OTHERS_ACCEPTED) for name, taken in table.items()}
    fields |= {"max_tokens": 5, "max_completion_tokens": 5}
    assert server.answer(**fields)["choices"] == server.answer(max_tokens=5)["choices"]


def test_a_body_may_begin_with_a_byte_order_mark(parser):
    body = b'{"messages": [{"role": "user", "content": "hi"}]}'
    assert meaning(parser, b"\xef\xbb\xbf" + body) == meaning(parser, body)


MANY = {
    "stop": ("[", "1", "]"),
    "bad_words": ("[", "0", "]"),
    "n": ("[", "[]", "]"),
    "metadata": ('{"a": [', "[]", "]}"),
    "messages": ("[", '{"role":"user","content":""}', "]"),
    "tools": ("[", "{}", "]"),
    "logit_bias": ("{", '"1":1', "}"),
    "unknown": ("[", '""', "]"),
}


@pytest.mark.parametrize("num", [30_000, 3_000_000])
@pytest.mark.parametrize("name", MANY)
def test_many_values_are_refused_quickly(name, num):
    """Without the limit, an error for each of 8 million values takes minutes and gigabytes."""
    begin, item, end = MANY[name]
    items = ",".join([item] * num)
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "{name}": {begin}{items}{end}}}'.encode()
    start = time.process_time()
    if (name, num) == ("metadata", 30_000):
        parse_request(body)
    else:
        with pytest.raises(ApiError) as caught:
            parse_request(body)
        assert caught.value.status == 400 and (num < MAX_VALUES or caught.value.code == "too_many_values")
    assert time.process_time() - start < 5  # and not minutes, on a slow machine


@pytest.mark.parametrize("text", [",", '\\"', "\\\\", '\\\\\\"', "[", '\\",'], ids=repr)
def test_commas_in_a_text_are_not_values(text):
    parsed = parse_request(f'{{"messages": [{{"role": "user", "content": "{text * 60_000}"}}]}}'.encode())
    assert len(parsed.messages[0].content) == len(json.loads(f'"{text}"')) * 60_000


# --- variables of the chat template ---

THINKING_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }};{% endfor %}"
    "{% if enable_thinking is false %}no{% elif enable_thinking %}yes{% endif %}{{ level }}"
)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "hi;"),
        ({"chat_template_kwargs": None, "enable_thinking": None}, "hi;"),
        ({"chat_template_kwargs": {}}, "hi;"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "hi;no"),
        ({"chat_template_kwargs": {"enable_thinking": True, "level": 3, "unused": [1]}}, "hi;yes3"),
        ({"enable_thinking": False}, "hi;no"),
        ({"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": False, "level": "x"}}, "hi;nox"),
    ],
)
@pytest.mark.parametrize("default", [None, 7])
def test_variables_reach_the_chat_template(model, monkeypatch, fields, text, default):
    monkeypatch.setattr(model.tokenizer, "chat_template", THINKING_TEMPLATE)
    parser = RequestParser(model, "tiny", defaults=default and {"chat_template_kwargs": {"level": default}})
    _, prompt, _ = read(parser, **fields)
    if default is not None and "level" not in (fields.get("chat_template_kwargs") or {}):
        text += str(default)
    assert model.tokenizer.decode(prompt.parts[0]) == text


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs must not have the key 'messages'", None),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs must be names with JSON values", None),
        ({"chat_template_kwargs": {"today": "soon"}}, "chat_template_kwargs.today", None),
        ({"chat_template_kwargs": {"level": "</s>"}}, "chat_template_kwargs.level must not hold a control token", None),
        ({"enable_thinking": "no"}, "enable_thinking", "enable_thinking"),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, "leave one", "enable_thinking"),
    ],
    ids=str,
)
def test_wrong_variables_are_named(parser, fields, message, param):
    with pytest.raises(ApiError) as caught:
        read(parser, **fields)
    assert message in caught.value.message and caught.value.param == (param or "chat_template_kwargs")


# --- messages ---

HI = [{"role": "user", "content": "hi"}]
SAME_MESSAGES = [
    ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], HI),
    ([{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}], HI),
    ([{"role": "user", "content": "hi", "name": "ann"}], HI),
    ([{"role": "user", "content": "hi", "name": None}], HI),
    ([{"role": "user", "content": "hi", "cache_control": {"type": "ephemeral"}}], HI),
    (
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "hi", "prompt_cache_breakpoint": {"mode": "explicit"}},
                    {"type": "text", "text": "", "cache_control": {"type": "ephemeral"}},
                ],
            }
        ],
        HI,
    ),
    ([{"role": "developer", "content": "be brief"}, *HI], [{"role": "system", "content": "be brief"}, *HI]),
    (
        [{"role": "developer", "content": [{"type": "text", "text": "be brief"}], "name": "me"}, *HI],
        [{"role": "system", "content": "be brief"}, *HI],
    ),
]
ASSISTANT = [
    {"refusal": None},
    {"refusal": ""},
    {"audio": None},
    {"function_call": None},
    {"tool_calls": None},
    {"tool_calls": []},
    {"tool_call_id": None},
    {"annotations": None},
    {"annotations": []},
    {"annotations": [{"type": "url_citation", "url_citation": {"url": "http://a", "title": "a"}}]},
    {"reasoning_content": None},
    {"reasoning_content": ""},
    {"reasoning": None},
    {"parts": None},
    {"name": "bot"},
]


@pytest.mark.parametrize(("given", "same"), SAME_MESSAGES, ids=range(len(SAME_MESSAGES)))
def test_equivalent_messages(parser, given, same):
    assert meaning(parser, messages=given) == meaning(parser, messages=same)


@pytest.mark.parametrize("more", ASSISTANT, ids=str)
@pytest.mark.parametrize("content", ["ok", "", None, []], ids=str)
def test_answers_that_are_sent_back(parser, content, more):
    answer = {"role": "assistant", "content": content, **more}
    expected = {"role": "assistant", "content": content or ""}
    assert meaning(parser, messages=[*HI, answer, *HI]) == meaning(parser, messages=[*HI, expected, *HI])


def test_an_answer_without_content(parser):
    answer = {"role": "assistant", "refusal": None}
    expected = {"role": "assistant", "content": ""}
    assert meaning(parser, messages=[*HI, answer, *HI]) == meaning(parser, messages=[*HI, expected, *HI])


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages[0].role"),
        ({"role": "function", "content": "x", "name": "f"}, "messages[0].role"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1", **TOOL}]}, "messages[0].tool_calls"),
        ({"role": "assistant", "content": None, "function_call": CALL}, "messages[0].function_call"),
        ({"role": "assistant", "content": None, "refusal": "I cannot"}, "messages[0].refusal"),
        ({"role": "assistant", "content": None, "audio": {"id": "1"}}, "messages[0].audio"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "file", "file": {"file_id": "1"}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": {"type": "text", "text": "x"}}, "messages[0].content"),
        ({"role": "user", "content": [TEXT] * 1001}, "messages[0].content"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_messages_that_are_not_supported_are_named(parser, message, param):
    with pytest.raises(ApiError) as caught:
        read(parser, messages=[message])
    assert (caught.value.status, caught.value.param) == (400, param)


def test_messages_have_all_fields_of_openai():
    assert {"role", "content", "name", "refusal", "audio", "function_call", "tool_calls"} <= set(
        ChatMessage.model_fields
    )
    assert {"type", "text", "prompt_cache_breakpoint"} <= set(TextPart.model_fields)


# --- images ---

PNG = data_url(picture())
DATA = PNG.partition(",")[2]
RAW = base64.b64decode(DATA)
# A file whose base64 has all that the variants change: + and /, and padding
ODD = bytes(range(256)) * 3 + b"\xfb\xff\xfe\xfb"
ENCODED = base64.b64encode(ODD).decode()
SAME_URLS = {
    "plain": f"data:image/png;base64,{ENCODED}",
    "jpg": f"data:image/jpg;base64,{ENCODED}",
    "jpeg": f"data:image/jpeg;base64,{ENCODED}",
    "pjpeg": f"data:image/pjpeg;base64,{ENCODED}",
    "webp": f"data:image/webp;base64,{ENCODED}",
    "any": f"data:image/*;base64,{ENCODED}",
    "octets": f"data:application/octet-stream;base64,{ENCODED}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{ENCODED}",
    "parameter": f"data:image/png;charset=utf-8;base64,{ENCODED}",
    "parameters": f'data:image/png;name="a b.png";x=1;base64,{ENCODED}',
    "spaces": f" data:image/png; base64, {ENCODED} \n",
    "lines": f"data:image/png;base64,\n{base64.encodebytes(ODD).decode()}",
    "CRLF": "data:image/png;base64," + base64.encodebytes(ODD).decode().replace("\n", "\r\n"),
    "no padding": f"data:image/png;base64,{ENCODED.rstrip('=')}",
    "too much padding": f"data:image/png;base64,{ENCODED}==",
    "URL-safe": f"data:image/png;base64,{base64.urlsafe_b64encode(ODD).decode()}",
    "percent": f"data:image/png;base64,{quote(ENCODED, safe='')}",
    "percent, lower case": "data:image/png;base64,"
    + re.sub("%..", lambda code: code[0].lower(), quote(ENCODED, safe="")),
    "percent lines": f"data:image/png;base64,{ENCODED[:76]}%0D%0a{ENCODED[76:]}%20",
}


@pytest.mark.parametrize("kind", SAME_URLS)
def test_urls_of_the_same_image(kind):
    assert {"+", "/", "="} <= set(ENCODED)
    assert parse_data_url(SAME_URLS[kind]) == ODD


@pytest.mark.parametrize("bad", ["A*A=", "AAAAA", "AA=A", "\u00e9\u00e9\u00e9\u00e9", "%zz", "A%00A"])
def test_wrong_base64_is_an_error(bad):
    with pytest.raises(ValueError):  # noqa: PT011
        parse_data_url(f"data:image/png;base64,{bad}")


@pytest.mark.parametrize(
    "part",
    [
        image_part(PNG),
        {"type": "image_url", "image_url": PNG},
        {"type": "image_url", "image_url": {"url": PNG, "detail": "auto"}},
        {"type": "image_url", "image_url": {"url": PNG, "detail": "original"}},
        {"type": "image_url", "image_url": {"url": PNG, "detail": None}},
        {"type": "image_url", "image_url": {"url": PNG}, "prompt_cache_breakpoint": {"mode": "explicit"}},
        image_part("data:image/png;base64,\n" + base64.encodebytes(RAW).decode()),
    ],
    ids=range(7),
)
def test_parts_of_the_same_image(parser, server, part):
    def message(image):
        return [{"role": "user", "content": [image, {"type": "text", "text": "hi"}]}]

    assert meaning(parser, messages=message(part)) == meaning(parser, messages=message(image_part(PNG)))
    assert server.post(messages=message(part), max_tokens=1).status_code == 200


def test_the_picture_of_these_tests_is_one():
    assert image_of(PNG).shape == (8, 8) and io.BytesIO(RAW).read(4) == b"\x89PNG"
