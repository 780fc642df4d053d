"""Conversations as other programs write them, read as the project's own form of the same conversation."""

import base64
import json

import pytest

from lmfusion.data.sources.interleaved import InterleavedFiles
from tests.lmfusion.data.storage.stored import encoded, equal, picture


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(image=picture(i)))
    return tmp_path


def read(folder, line):
    """Roles and contents, with the bytes of image 0 or 1 as that number."""
    (folder / "a.jsonl").write_text(json.dumps(line) + "\n")
    source = InterleavedFiles(str(folder / "a.jsonl"))
    return [(message["role"], [_plain(part) for part in message["content"]]) for message in source[0].messages]


def _plain(part):
    if isinstance(part, str):
        return part
    loaded = part()
    return next(i for i in range(2) if equal(loaded, encoded(image=picture(i))))


def data_url(i, kind="image/jpeg"):
    return f"data:{kind};base64,{base64.b64encode(encoded(image=picture(i))).decode()}"


EXPECTED = [("user", [0, "What is this?"]), ("assistant", ["A cat."])]
QUESTION, ANSWER = {"type": "text", "text": "What is this?"}, {"role": "assistant", "content": "A cat."}


def openai(part):
    return {"messages": [{"role": "user", "content": [part, QUESTION]}, ANSWER]}


@pytest.mark.parametrize(
    "line",
    [
        openai({"image": "0.jpg"}),
        openai({"type": "image_url", "image_url": {"url": "0.jpg"}}),
        openai({"type": "image_url", "image_url": {"url": "0.jpg", "detail": "low"}}),
        openai({"type": "image_url", "image_url": "0.jpg"}),
        openai({"type": "image_url", "image_url": {"url": data_url(0)}}),
        openai({"type": "image_url", "image_url": {"url": data_url(0).replace("data:", "DATA:")}}),
        openai({"type": "input_image", "image_url": data_url(0)}),
        openai({"type": "image", "image": "0.jpg"}),
        openai({"type": "image", "path": "0.jpg"}),
        openai({"type": "image", "url": "0.jpg"}),
        openai({"image": data_url(0)}),
        openai({"type": "image"}) | {"images": ["0.jpg"]},
        openai({"type": "image"}) | {"image": "0.jpg"},
        openai({"type": "image"}) | {"images": [{"path": "0.jpg", "bytes": None}]},
        {"messages": [{"role": "user", "content": "<image>What is this?"}, ANSWER], "images": ["0.jpg"]},
        {
            "image": "0.jpg",
            "conversations": [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": "A cat."}],
        },
        {
            "images": ["0.jpg"],
            "conversations": [
                {"role": "user", "content": "<image>What is this?"},
                {"role": "assistant", "content": "A cat."},
            ],
        },
    ],
)
def test_one_conversation_in_many_forms(folder, line):
    assert read(folder, line) == EXPECTED


def test_llava_conversations(folder):
    line = {
        "id": "000000033471",
        "image": ["0.jpg", "1.jpg"],
        "system": "Answer briefly.",
        "conversations": [
            {"from": "human", "value": "<image>\nAnd <image>, are they alike?"},
            {"from": "gpt", "value": "No."},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "One is red."},
        ],
    }
    assert read(folder, line) == [
        ("system", ["Answer briefly."]),
        ("user", [0, "\nAnd ", 1, ", are they alike?"]),
        ("assistant", ["No."]),
        ("user", ["Why?"]),
        ("assistant", ["One is red."]),
    ]
    text_only = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert read(folder, text_only) == [("user", ["Hi"]), ("assistant", ["Hello"])]


def test_openai_conversations(folder):
    line = {
        "messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "Draw <image>", "name": "ann"},
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Here:"}, {"image": "1.jpg"}],
                "weight": 1,
            },
        ],
        "tools": [],
    }
    assert read(folder, line) == [
        ("system", ["Be kind."]),
        ("user", ["Draw <image>"]),
        ("assistant", ["Here:", 1]),
    ]


def test_nulls_and_empty_images_are_as_if_absent(folder):
    line = {
        "image": "",
        "content": None,
        "conversations": [
            {"from": "human", "value": "Hi", "role": None, "weight": None, "content": None},
            {"from": "gpt", "value": "Hello", "tool_calls": None},
        ],
    }
    assert read(folder, line) == [("user", ["Hi"]), ("assistant", ["Hello"])]


def human(text, **line):
    return line | {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "No."}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (human("<image>"), "places for more images than the line names"),
        (human("<image> <image>", image="0.jpg"), "places for more images than the line names"),
        (human("What?", image="0.jpg"), "the line names 1 images, and its texts have places for 0"),
        (human("<image>", image="0.jpg", images=["1.jpg"]), "both image and images"),
        (human("<image>", image=3), "image must name an image by a path or a data URL"),
        (human("<image>", image="../0.jpg"), "must stay in the folder"),
        (human("<image>", image="https://example.org/0.jpg"), "which is not fetched; download it"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "every message must have a role"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "every message must have a role"),
        ({"conversations": [{"from": "human", "value": None}]}, "the content of the human's message must be a text"),
        ({"conversations": [], "messages": []}, "only one of content, messages, conversations"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "has tool calls"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "the weight must be 1, or be left out"),
        ({"messages": [ANSWER], "tools": [{"type": "function"}]}, "the line has tools"),
        (openai({"type": "image"}), "content must hold texts"),
        (openai({"type": "video", "video": "x.mp4"}), "content must hold texts"),
        (openai({"type": "input_audio", "input_audio": {}}), "content must hold texts"),
        (openai({"type": "image_url", "image_url": {"uri": "0.jpg"}}), "must name an image by a path or a data URL"),
    ],
)
def test_lines_that_are_refused(folder, line, message):
    with pytest.raises(ValueError, match=rf"a.jsonl/line 1: .*{message}"):
        read(folder, line)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png,abc", "a data URL must be like"),
        ("data:image/png;base64,a", "must have valid base64"),
        ("data:image/png;base64,!!!!", "must have valid base64"),
        ("data:image/png;base64,aGVsbG8=", "not an image of a known format"),
    ],
)
def test_data_urls_that_hold_no_image(folder, url, message):
    with pytest.raises(ValueError, match=message):
        read(folder, openai({"image": url}))


@pytest.mark.parametrize("text", ['[{"id": 1}]', '\ufeff\n [\n  {"id": 1}\n]\n'])
def test_a_json_array_is_refused_with_the_way_out(folder, text):
    (folder / "a.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.jsonl must have one object on each line, but is a JSON array"):
        InterleavedFiles(str(folder / "a.jsonl"))
