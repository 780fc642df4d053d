"""Tests chats over HTTP: answers equal the engine's, whole or streamed, alone or side by side."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lmfusion.generation.engine import Engine
from lmfusion.generation.events import Done, ImageBegin, ImageEnd, ImagePreview, TextDelta
from lmfusion.generation.options import GenerationOptions
from lmfusion.generation.prompt import encode_prompt
from tests.lmfusion.serving.conftest import IMAGE_SIZE, data_url, image_of, image_part, picture

pytestmark = pytest.mark.timeout(60)

DRAWING = dict(max_tokens=6, min_images=1, max_images=1, num_steps=3, seed=3, temperature=0.8)


def engine_events(model, messages, **options):
    engine = Engine(model, num_slots=1024)
    engine.submit(encode_prompt(model, messages), GenerationOptions(**options))
    events = []
    while engine.has_work:
        events += [event for _, event in engine.step()]
    return events


def drawn_settings(answer):
    return next(part for part in answer["choices"][0]["message"]["parts"] if part["type"] == "image_url")["settings"]


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def images_of(events):
    return [np.asarray(event.image) for event in events if isinstance(event, ImageEnd)]


def test_the_answer_is_the_engines(server, model):
    fields = dict(DRAWING, max_tokens=None, max_completion_tokens=6, top_p=0.9, top_k=50, sampler="dpm-solver")
    fields |= dict(guidance_scale=2.0, guidance_interval=[0.1, 0.9], guidance_rescale=0.5, negative_prompt="bad")
    body = server.answer(messages=[{"role": "user", "content": "draw"}], **fields)
    expected = engine_events(
        model,
        [{"role": "user", "content": "draw"}],
        max_new_tokens=6,
        min_images=1,
        max_images=1,
        num_steps=3,
        seed=3,
        temperature=0.8,
        top_p=0.9,
        top_k=50,
        sampler="dpm-solver",
        guidance_scale=2.0,
        guidance_interval=(0.1, 0.9),
        guidance_rescale=0.5,
        negative_prompt="bad",
    )
    message, done = body["choices"][0]["message"], expected[-1]
    assert message["content"] == text_of(expected) != ""
    kinds = [part["type"] for part in message["parts"]]
    assert kinds.count("image_url") == 1 and "".join(p.get("text", "") for p in message["parts"]) == message["content"]
    drawn = next(part for part in message["parts"] if part["type"] == "image_url")
    np.testing.assert_array_equal(image_of(drawn["image_url"]["url"]), images_of(expected)[0])
    assert drawn["settings"]["seed"] == 3 and drawn["settings"]["prompt"] == "draw"
    assert body["choices"][0]["finish_reason"] == done.finish_reason
    usage = dict(prompt_tokens=done.num_prompt_tokens, completion_tokens=done.num_new_tokens, images=1)
    assert body["usage"] == usage | {"total_tokens": done.num_prompt_tokens + done.num_new_tokens}
    assert (body["object"], body["model"]) == ("chat.completion", "tiny") and body["id"].startswith("chatcmpl-")


@pytest.mark.parametrize("changed", [{"seed": 4}, {"num_steps": 2}, {"guidance_scale": 4.0}, {"sampler": "ddim"}])
def test_settings_of_images_have_an_effect(server, changed):
    def drawing(**fields):
        parts = server.answer(**{**DRAWING, "draw_first": True, **fields})["choices"][0]["message"]["parts"]
        return image_of(parts[0]["image_url"]["url"])

    assert (drawing() != drawing(**changed)).any()


def test_streamed_and_whole_answers_are_the_same(server):
    whole = server.answer(**DRAWING)
    chunks = server.chunks(**DRAWING, preview_every=1, stream_options={"include_usage": True})
    *made, last, counts = chunks
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in made]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert counts["choices"] == [] and counts["usage"] == whole["usage"]

    images = [delta["image"] for delta in deltas if "image" in delta]
    begin, *previews, end = images
    assert begin == {"event": "begin", "index": 0, "width": IMAGE_SIZE, "height": IMAGE_SIZE, "num_steps": 3}
    assert previews and {preview["event"] for preview in previews} == {"preview"}
    assert all(image_of(preview["url"]).shape[:2] == (IMAGE_SIZE, IMAGE_SIZE) for preview in previews)
    assert all(1 <= preview["step"] <= preview["num_steps"] == 3 for preview in previews)
    drawn = next(part for part in whole["choices"][0]["message"]["parts"] if part["type"] == "image_url")
    assert (end["event"], end["index"]) == ("end", 0) and end["url"] == drawn["image_url"]["url"]
    assert end["settings"]["num_steps"] == 3


def test_streams_without_usage_and_previews_have_neither(server):
    chunks = server.chunks(**DRAWING)
    assert all("usage" not in chunk and len(chunk["choices"]) == 1 for chunk in chunks)
    events = [chunk["choices"][0]["delta"].get("image", {}).get("event") for chunk in chunks]
    assert [event for event in events if event] == ["begin", "end"]


def test_an_uploaded_image_is_read(server, model):
    def answer(image):
        content = [image_part(data_url(image)), {"type": "text", "text": "what?"}]
        return server.answer(
            messages=[{"role": "user", "content": content}], max_tokens=12, temperature=1.0, max_images=0
        )

    seen, other = answer(picture(0)), answer(picture(1))
    expected = engine_events(
        model, [{"role": "user", "content": [picture(0), "what?"]}], max_new_tokens=12, temperature=1.0
    )
    assert seen["choices"][0]["message"]["content"] == text_of(expected) != other["choices"][0]["message"]["content"]
    assert seen["usage"]["prompt_tokens"] == expected[-1].num_prompt_tokens > 16


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_large_images_are_scaled_as_in_training(server, model, kind):
    large = picture(2, size=(40, 30))
    options = {"png": {}, "webp": {"lossless": True}, "jpeg": {"quality": 100}}[kind]
    content = [image_part(data_url(large, kind, **options))]
    fields = dict(max_tokens=12, temperature=1.0, max_images=0)
    answer = server.answer(messages=[{"role": "user", "content": content}], **fields)
    if kind == "jpeg":
        assert answer["usage"]["prompt_tokens"] > 16
        return
    expected = engine_events(model, [{"role": "user", "content": [large]}], max_new_tokens=12, temperature=1.0)
    assert answer["choices"][0]["message"]["content"] == text_of(expected)


def test_an_answer_can_be_sent_back_unchanged(server, model):
    first = server.answer(**DRAWING)["choices"][0]["message"]
    question = {"role": "user", "content": "hi"}
    history = [question, first | {"refusal": None, "tool_calls": None}, {"role": "user", "content": "and now?"}]
    parts = [p["text"] if p["type"] == "text" else image_of(p["image_url"]["url"]) for p in first["parts"]]
    expected = engine_events(
        model, [question, {"role": "assistant", "content": parts}, history[-1]], max_new_tokens=8, temperature=1.0
    )
    again = server.answer(messages=history, max_tokens=8, temperature=1.0, max_images=0)
    assert again["choices"][0]["message"]["content"] == text_of(expected)
    assert again["usage"]["prompt_tokens"] == expected[-1].num_prompt_tokens


def test_developer_means_system_and_names_are_ignored(server):
    def answer(role, **more):
        messages = [{"role": role, "content": "be brief", **more}, {"role": "user", "content": "hi", **more}]
        return server.answer(messages=messages, max_tokens=8, temperature=1.0)["choices"][0]["message"]["content"]

    assert answer("system") == answer("developer") == answer("system", name="ann") != answer("user")


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings_end_the_text(server, as_list):
    text = server.answer(max_tokens=30, temperature=1.0, max_images=0, seed=8)["choices"][0]["message"]["content"]
    middle = next(text[i] for i in range(3, len(text)) if text[i].isascii() and text[i] not in text[:i])
    stopped = server.answer(
        max_tokens=30, temperature=1.0, max_images=0, seed=8, stop=[middle, "zzzz"] if as_list else middle
    )
    assert stopped["choices"][0]["message"]["content"] == text.partition(middle)[0]
    assert stopped["choices"][0]["finish_reason"] == "stop"


def test_harmless_fields_of_clients_change_nothing(server):
    fields = dict(model="tiny", user="me", metadata={"a": "b"}, n=1, presence_penalty=0, frequency_penalty=0.0)
    fields |= dict(logprobs=False, logit_bias={}, response_format={"type": "text"}, store=False, service_tier="auto")
    fields |= dict(stop=None, seed=None, top_p=None, stream=None, tools=[], parallel_tool_calls=True)
    short = {"max_tokens": 20, "num_steps": 3}
    assert server.answer(**fields, **short)["choices"] == server.answer(**short)["choices"]


def test_answers_side_by_side_equal_single_ones(server):
    requests = [
        dict(
            seed=i, temperature=1.0, max_tokens=4 + i % 5, min_images=i % 3, num_steps=2 + i % 3, draw_first=i % 3 == 2
        )
        for i in range(12)
    ]
    alone = [server.answer(**request)["choices"] for request in requests]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda request: server.answer(**request)["choices"], requests)) == alone
    assert len({str(choices) for choices in alone}) == 12


def test_min_images_raises_the_default_of_max_images(server):
    answer = server.answer(min_images=5, num_steps=1, max_tokens=2)
    assert answer["usage"]["images"] == 5


def test_defaults_of_the_server_apply_to_missing_fields(serve):
    server = serve(defaults={"num_steps": 2, "min_images": 1, "max_tokens": 3, "sampler": "ddim"})
    settings = drawn_settings(server.answer())
    assert (settings["num_steps"], settings["sampler"]) == (2, "ddim")
    assert drawn_settings(server.answer(num_steps=3))["num_steps"] == 3
    assert server.answer(min_images=0, max_images=0)["usage"]["images"] == 0


def test_all_events_of_the_engine_are_known(model):
    """Fails when there is a new kind of event, which `streaming` must handle."""
    kinds = {
        type(event)
        for event in engine_events(
            model,
            [{"role": "user", "content": "x"}],
            max_new_tokens=3,
            min_images=1,
            max_images=1,
            num_steps=3,
            preview_every=1,
            temperature=1.0,
        )
    }
    assert kinds == {TextDelta, ImageBegin, ImagePreview, ImageEnd, Done}
