"""The engine: its answers are the specification's, alone or in a batch, and requests that end free their cache."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from lmfusion.generation import (
    Done,
    Engine,
    GenerationOptions,
    ImageBegin,
    ImageEnd,
    ImagePreview,
    Limits,
    TextDelta,
    encode_prompt,
)
from lmfusion.generation.samplers import SchedulerRun
from tests.lmfusion.generation import reference
from tests.lmfusion.generation.models import UNET, build, teach_boi
from tests.lmfusion.generation.test_graphs import Tracer

PICTURES = [np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8) for i in range(3)]
PROMPTS = ["a seven", ["one", PICTURES[0], "and two", PICTURES[1], "so"], "x", [PICTURES[2]]]
DENOISE = dict(max_new_tokens=6, max_images=2, min_images=2, num_steps=3, guidance_scale=2.0, sampler="dpm-solver")

EULER = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


@pytest.fixture(scope="module")
def model(tiny_llama):
    return build(tiny_llama)


def run(engine, requests):
    """Events of each of `requests` [(prompt, options)], by their index, all submitted at once."""
    position = {engine.submit(prompt, options, index=i): i for i, (prompt, options) in enumerate(requests)}
    return collect(engine, position)


def collect(engine, position):
    events = {i: [] for i in position.values()}
    while engine.has_work:
        for request_id, event in engine.step():
            events[position[request_id]].append(event)
    return events


def parts(events):
    """Text and pixels in order, adjacent texts joined."""
    found = [""]
    for event in events:
        if isinstance(event, TextDelta):
            found[-1] += event.text
        elif isinstance(event, ImageEnd):
            found += [np.asarray(event.image).astype(int), ""]
    return found


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        if isinstance(a, str):
            assert a == b
        else:
            np.testing.assert_array_equal(a, b)


def expected_parts(model, prompt, options, index=0):
    answer = reference.answer(model, prompt, options, index)
    return [
        model.tokenizer.decode(part, skip_special_tokens=True)
        if isinstance(part, list)
        else ((part[0] + 1) * 127.5).round().clamp(0, 255).to(int).numpy()
        for part in answer
    ]


@pytest.mark.parametrize("kind", ["linear", "unet"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_guidance_scale": 1.5},
        {"image_guidance_scale": 1.0, "sampler": "ddpm"},
        {"guidance_interval": (0.4, 0.9), "guidance_rescale": 0.7, "sampler": "ddim"},
        {"negative_prompt": "blur", "image_size": 12},
        {"guidance_scale": 1.0, "draw_first": True},
        {"max_new_tokens": 0},
    ],
)
def test_answers_are_those_of_the_specification(tiny_llama, kind, changes):
    """Interleaved prompts and answers, in a batch with the cache, compared with whole documents without a cache."""
    model = build(tiny_llama, **(UNET if kind == "unet" else {}))
    options = GenerationOptions(**{**DENOISE, **changes})
    prompts = [encode_prompt(model, prompt) for prompt in PROMPTS]
    events = run(Engine(model, num_slots=2000), [(prompt, options) for prompt in prompts])
    for i, prompt in enumerate(prompts):
        found, expected = parts(events[i]), expected_parts(model, prompt, options, i)
        assert len(found) == len(expected) == 5
        for a, b in zip(found, expected, strict=True):
            if isinstance(a, str):
                assert a == b
            else:
                assert np.abs(a - b).max() <= 1 and a.std() > 10


def test_text_switches_to_an_image_by_itself_and_goes_on(tiny_llama):
    """Text, image, text, image, text: BOI is the model's own."""
    model = build(tiny_llama)
    prompt = ["one", PICTURES[0], "two", PICTURES[1]]
    teach_boi(model, prompt, 3)
    options = GenerationOptions(max_new_tokens=12, max_images=2, num_steps=3, sampler="ddim")
    read = encode_prompt(model, prompt)
    events = run(Engine(model, num_slots=2000), [(read, options)])[0]
    found, expected = parts(events), expected_parts(model, read, options)
    assert len(reference.answer(model, read, options)[0]) == 3
    assert len(found) == len(expected) >= 3
    assert [a for a in found if isinstance(a, str)] == [b for b in expected if isinstance(b, str)]
    silent = run(Engine(model, num_slots=2000), [(read, GenerationOptions(max_new_tokens=12))])[0]
    assert not any(isinstance(event, ImageBegin) for event in silent) and parts(silent)[0] != found[0]
    assert parts(silent)[0].startswith(found[0])


def mixed_requests(model):
    options = [
        GenerationOptions(**DENOISE, seed=3),
        GenerationOptions(max_new_tokens=20, temperature=1.2, top_p=0.9, seed=1),
        GenerationOptions(**{**DENOISE, "num_steps": 7, "sampler": "ddpm", "guidance_scale": 1.0}),
        GenerationOptions(**{**DENOISE, "temperature": 0.8, "top_k": 20, "image_guidance_scale": 1.3}),
    ]
    return [(encode_prompt(model, prompt), chosen) for prompt, chosen in zip(PROMPTS, options, strict=True)]


@pytest.mark.parametrize("max_batch", [1, 2, 4])
def test_batched_is_single(model, max_batch):
    requests = mixed_requests(model)
    together = run(Engine(model, num_slots=1500, max_batch=max_batch), requests)
    for i, (prompt, options) in enumerate(requests):
        engine = Engine(model, num_slots=1500)
        alone = collect(engine, {engine.submit(prompt, options, index=i): i})
        assert_same(parts(together[i]), parts(alone[i]))


class OnDevice(torch.Tensor):
    """Stands in for a tensor on a GPU: code that reads its numbers would have to wait for the device."""

    WAITING = (
        "item",
        "tolist",
        "numpy",
        "cpu",
        "nonzero",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__contains__",
    )

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in [getattr(torch.Tensor, name) for name in cls.WAITING]:
            raise AssertionError(f"{function.__name__} waits for the device")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("sampler", ["ddpm", "dpm-solver"])
def test_a_denoising_step_waits_for_nothing(model, sampler):
    options = GenerationOptions(**{**DENOISE, "sampler": sampler}, draw_first=True, guidance_rescale=0.5)
    engine = Engine(model, num_slots=1500)
    for i in range(3):
        engine.submit(encode_prompt(model, "a seven"), options, index=i)
    engine.step()
    states = [request.denoising for request in engine._running.values()]
    for state in states:
        state.x, state.x0 = (x.as_subclass(OnDevice) for x in (state.x, state.x0))
    engine.step()
    engine.step()
    assert [state.step for state in states] == [2, 2, 2]
    assert all(isinstance(state.x, OnDevice) and isinstance(state.x0, OnDevice) for state in states)
    with pytest.raises(AssertionError, match="tolist waits"):
        states[0].x.tolist()


def test_replayed_steps_are_the_steps(model, monkeypatch):
    """Batches are padded to powers of two, and every shape of a step is recorded once."""
    requests = mixed_requests(model)[::2]
    eager = run(Engine(model, num_slots=1500), requests)
    monkeypatch.setattr("lmfusion.generation.engine.recorder_for", lambda *_: Tracer())
    engine = Engine(model, num_slots=1500)
    replayed = run(engine, requests)
    for i in range(len(requests)):
        assert_same(parts(replayed[i]), parts(eager[i]))
    for step in (engine._decode_step, engine._denoiser.denoise):
        assert step.num_replayed > step.num_recorded > 0


@pytest.mark.parametrize("gap", [1, 3, 10])
def test_joined_late_is_alone(model, gap):
    """A request joins every `gap` steps, while those before it decode and denoise."""
    requests = mixed_requests(model)
    engine, position, events = Engine(model, num_slots=1500), {}, {}
    for step in itertools.count():
        if step % gap == 0 and len(position) < len(requests):
            i = len(position)
            position[engine.submit(*requests[i], index=i)] = i
        if not engine.has_work and len(position) == len(requests):
            break
        for request_id, event in engine.step():
            events.setdefault(position[request_id], []).append(event)
    alone = run(Engine(model, num_slots=1500, max_batch=1), requests)
    for i in range(len(requests)):
        assert_same(parts(events[i]), parts(alone[i]))


def test_a_small_cache_makes_requests_wait_and_changes_nothing(model):
    requests = mixed_requests(model)
    need = max(num_slots_of(model, *request) for request in requests)
    narrow = Engine(model, num_slots=need)
    position = {narrow.submit(*request, index=i): i for i, request in enumerate(requests)}
    assert narrow.num_waiting == 4
    narrow.step()
    assert narrow.num_running < 4 and narrow.num_waiting > 0
    events = collect(narrow, position)
    wide = run(Engine(model, num_slots=3000), requests)
    for i in range(4):
        assert_same(parts(events[i]), parts(wide[i]))
    assert narrow.num_slots_used == 0


def num_slots_of(model, prompt, options):
    engine = Engine(model, num_slots=5000)
    engine.submit(prompt, options)
    engine.step()
    return engine.num_slots_used


@pytest.mark.parametrize("num_steps_before", [0, 1, 4, 9])
def test_cancelling_frees_the_cache_and_leaves_the_others_alone(model, num_steps_before):
    requests = mixed_requests(model)
    engine = Engine(model, num_slots=1500)
    position = {engine.submit(*request, index=i): i for i, request in enumerate(requests)}
    ids = list(position)
    events = {i: [] for i in range(4)}
    for _ in range(num_steps_before):
        for request_id, event in engine.step():
            events[position[request_id]].append(event)
    used = engine.num_slots_used
    engine.cancel(ids[0])
    engine.cancel(ids[0])
    assert engine.num_slots_used == 0 if num_steps_before == 0 else engine.num_slots_used < used
    for i, rest in collect(engine, position).items():
        events[i] += rest
    assert [event for event in events[0] if isinstance(event, Done)] == [events[0][-1]]
    assert events[0][-1].finish_reason == "cancelled"
    alone = run(Engine(model, num_slots=1500, max_batch=1), requests)
    for i in range(1, 4):
        assert_same(parts(events[i]), parts(alone[i]))
    assert engine.num_slots_used == 0


def test_events_come_in_order(model):
    options = GenerationOptions(**{**DENOISE, "num_steps": 7}, preview_every=2)
    events = run(Engine(model, num_slots=1500), [(encode_prompt(model, "a seven"), options)])[0]
    kinds = [type(event).__name__ for event in events]
    drawn = ["ImageBegin", "ImagePreview", "ImagePreview", "ImagePreview", "ImageEnd"]
    assert [kind for kind in kinds if kind != "TextDelta"] == [*drawn, *drawn, "Done"]
    first = kinds.index("ImageBegin")
    assert kinds[first : first + 5] == drawn  # no text comes in between
    previews = [event for event in events if isinstance(event, ImagePreview)]
    assert [(event.index, event.step, event.num_steps) for event in previews] == [
        (index, step, 7) for index in (0, 1) for step in (2, 4, 6)
    ]
    assert all(event.image.size == (8, 8) for event in previews)
    end = next(event for event in events if isinstance(event, ImageEnd))
    assert end.settings["prompt"] == "a seven" and end.settings["num_steps"] == 7
    last_preview = np.asarray(previews[2].image.convert("L")).astype(int)
    assert np.abs(last_preview - np.asarray(end.image)).mean() < np.abs(last_preview - 128).mean()


def test_stop_strings_end_the_answer(model):
    whole = model.generate(["a seven"], max_new_tokens=12)[0]
    stop = whole.text[4:7]
    cut = model.generate(["a seven"], max_new_tokens=12, stop_strings=[stop, "never there"])[0]
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    deltas = [
        e.text for e in model.stream("a seven", max_new_tokens=12, stop_strings=[stop]) if isinstance(e, TextDelta)
    ]
    assert "".join(deltas) == cut.text


def test_an_answer_ends_where_the_context_does(model):
    """256 tokens; room is reserved for the images that are still needed."""
    answer = model.generate(["word " * 40], max_new_tokens=100, max_images=1, min_images=1, num_steps=1)[0]
    assert answer.finish_reason == "length" and len(answer.images) == 1
    # The last token is not put into the cache, so it takes no slot
    assert answer.num_prompt_tokens + answer.num_new_tokens + 18 == 256 + 1 < answer.num_prompt_tokens + 118
    assert answer.num_new_tokens >= 30


def test_callback_sees_every_step_and_may_change_the_image(model):
    seen = []

    def watch(step, timestep, tensors):
        seen.append((step, timestep, tuple(tensors["latents"].shape)))

    options = dict(num_steps=4, sampler="ddim")
    plain = model.draw(["a seven"], **options)[0]
    watched = model.draw(["a seven"], **options, callback_on_step_end=watch)[0]
    assert seen == [(i, t, (1, 8, 8)) for i, t in enumerate((999, 749, 499, 249))]
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(watched))

    def blank(step, timestep, tensors):
        return {"latents": torch.ones_like(tensors["latents"])} if step == 3 else None

    assert (np.asarray(model.draw(["a seven"], **options, callback_on_step_end=blank)[0]) == 255).all()


def test_a_failing_callback_ends_its_request_alone(model):
    def fail(step, timestep, tensors):
        if step == 1:
            raise RuntimeError("no more")

    prompt = encode_prompt(model, "a seven")
    good = GenerationOptions(**DENOISE)
    engine = Engine(model, num_slots=1500)
    events = run(engine, [(prompt, GenerationOptions(**DENOISE, callback_on_step_end=fail)), (prompt, good)])
    assert events[0][-1].finish_reason == "error" and "RuntimeError: no more" in events[0][-1].error
    assert events[1][-1].finish_reason == "length" and events[1][-1].num_images == 2
    assert engine.num_slots_used == 0
    with pytest.raises(RuntimeError, match="no more"):
        model.draw(["a seven"], num_steps=3, callback_on_step_end=fail)
    with pytest.raises(ValueError, match=r"of the shape \(1, 8, 8\), got \(2,\)"):
        model.draw(["a seven"], num_steps=3, callback_on_step_end=lambda *_: {"latents": torch.zeros(2)})


def test_callbacks_may_cancel_any_request(model):
    """Even itself, and raise afterwards. No event follows the end of an answer, and no slot is freed twice."""
    prompt = encode_prompt(model, "a seven")
    engine = Engine(model, num_slots=1500)

    def cancel_all(step, timestep, tensors):
        for request_id in ids:
            engine.cancel(request_id)
        raise RuntimeError("and now this")

    writing = GenerationOptions(max_new_tokens=50)
    drawing = GenerationOptions(**{**DENOISE, "sampler": EulerDiscreteScheduler(**EULER)}, draw_first=True)
    ids = [engine.submit(prompt, writing), engine.submit(prompt, drawing)]
    ids.append(engine.submit(prompt, replace(drawing, callback_on_step_end=cancel_all)))
    events = collect(engine, dict(zip(ids, range(3), strict=True)))
    for received in events.values():
        assert isinstance(received[-1], Done) and received[-1].finish_reason == "cancelled"
        assert sum(isinstance(event, Done) for event in received) == 1
    assert engine.num_slots_used == 0 and engine._cache.allocate([1500]) is not None


def test_a_failing_scheduler_is_one_failure(model, monkeypatch):
    called = []

    def fail(*_, **__):
        raise ArithmeticError("no step")

    scheduler = EulerDiscreteScheduler(**EULER)
    options = GenerationOptions(**{**DENOISE, "sampler": scheduler}, callback_on_step_end=lambda *_: called.append(1))
    monkeypatch.setattr(SchedulerRun, "step", fail)
    engine = Engine(model, num_slots=1500)
    events = run(engine, [(encode_prompt(model, "a seven"), options)])[0]
    assert events[-1].error == "ArithmeticError: no step" and not called and engine.num_slots_used == 0


def test_the_autoencoder_gets_few_images_at_a_time(model, monkeypatch):
    decoded, decode = [], type(model.codec).decode
    monkeypatch.setattr(type(model.codec), "decode", lambda self, x: (decoded.append(len(x)), decode(self, x))[1])
    images = model.draw(["x"] * 19, num_steps=1, batch_size=19)
    assert decoded == [8, 8, 3] and len({image.tobytes() for image in images}) == 19


def test_a_negative_prompt_has_room_beside_the_images(model, monkeypatch):
    """The branch with the images holds it, too, and must not exceed the LLM's window."""
    monkeypatch.setattr(model.config.text_config, "sliding_window", 100, raising=False)
    options = dict(max_new_tokens=60, max_images=4, min_images=2, num_steps=2, negative_prompt="y" * 30)
    answer = model.generate([["a", PICTURES[0]]], **options, image_guidance_scale=1.5)[0]
    assert len(answer.images) >= 2 and answer.finish_reason == "length"
    with pytest.raises(ValueError, match=r"negative_prompt must leave room .*, got 90 tokens"):
        model.generate(["a"], **{**options, "negative_prompt": "y" * 90})


def test_an_image_that_cannot_be_encoded_ends_its_request_alone(model, monkeypatch):
    encode = type(model.codec).encode

    def encode_one(codec, images):
        if images.shape[0] > 1:
            raise MemoryError("too many images")
        return encode(codec, images)

    monkeypatch.setattr(type(model.codec), "encode", encode_one)
    options = GenerationOptions(max_new_tokens=3)
    engine = Engine(model, num_slots=1500)
    prompts = [encode_prompt(model, prompt) for prompt in ([PICTURES[0], PICTURES[1]], [PICTURES[0]], "x")]
    events = run(engine, [(prompt, options) for prompt in prompts])
    assert [events[i][-1].finish_reason for i in range(3)] == ["error", "length", "length"]
    assert events[0][-1].error == "MemoryError: too many images" and engine.num_slots_used == 0


def test_closing_a_stream_cancels_it(model, monkeypatch):
    cancelled = []
    cancel = Engine.cancel
    monkeypatch.setattr(Engine, "cancel", lambda self, i: (cancel(self, i), cancelled.append(self.num_slots_used)))
    stream = model.stream("a seven", max_new_tokens=0, max_images=1, draw_first=True, num_steps=50)
    assert isinstance(next(stream), ImageBegin)
    stream.close()
    assert cancelled == [0]


def test_a_stream_leaves_gradients_and_training_mode_to_its_caller(model):
    model.train()
    try:
        for _ in model.stream("a seven", max_new_tokens=2):
            assert torch.is_grad_enabled()
        assert model.training
    finally:
        model.eval()


def test_nan_of_one_answer_does_not_reach_the_next(model):
    """Slots of the cache are cleared when another request gets them."""
    options = GenerationOptions(**DENOISE)
    prompt = encode_prompt(model, "a seven")
    engine = Engine(model, num_slots=num_slots_of(model, prompt, options))
    expected = parts(run(engine, [(prompt, options)])[0])
    poison = GenerationOptions(**DENOISE, callback_on_step_end=lambda *_: {"latents": torch.full((1, 8, 8), np.nan)})
    run(engine, [(prompt, poison)])
    assert_same(parts(run(engine, [(prompt, options)])[0]), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 9000}, "max_new_tokens must be at most 8000 here, got 9000"),
        ({"max_images": 2}, "max_images must be at most 1 here, got 2"),
        ({"max_images": 1, "num_steps": 999}, "num_steps must be at most 100 here, got 999"),
        ({"max_images": 1, "image_size": 4096}, "image_size must be at most 2048 here, got 4096"),
        ({"max_images": 1, "image_size": 7}, "multiples of the patch size 2, got 7 x 7"),
        ({"max_new_tokens": 200}, "must fit the key-value cache of 100 slots, got 256"),
    ],
)
def test_requests_that_can_never_run_are_refused(model, options, message):
    engine = Engine(model, num_slots=100, limits=Limits(max_new_tokens=8000, max_images=1, max_num_steps=100))
    with pytest.raises(ValueError, match=message):
        engine.submit(encode_prompt(model, "a seven"), GenerationOptions(**{"num_steps": 5, **options}))
    assert not engine.has_work


def test_images_in_a_prompt_are_limited(model):
    engine = Engine(model, num_slots=100, limits=Limits(max_prompt_images=1))
    with pytest.raises(ValueError, match="number of images in the prompt must be at most 1 here, got 2"):
        engine.submit(encode_prompt(model, PROMPTS[1]), GenerationOptions())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_slots": 0}, "num_slots must be"),
        ({"max_batch": 0}, "max_batch must be"),
        ({"use_graphs": True}, "graphs"),
    ],
)
def test_engines_that_cannot_be(model, settings, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, **settings)


def test_the_plan_counts_what_is_allocated(model):
    engine = Engine(model, num_slots=300, max_batch=4)
    allocated = sum(t.numel() * t.element_size() for pair in engine._cache.layers for t in pair)
    assert engine.plan.cache_bytes == allocated == 300 * 2 * 2 * 2 * 8 * 8
    assert engine.plan.text_bytes == sum(p.numel() * 8 for p in model.text.parameters())
    assert "300 tokens" in str(engine.plan)
    assert Engine(model, max_batch=3).num_slots == 3 * 256


def test_answers_hold_parts_in_order(model):
    answer = model.generate(["a seven"], **DENOISE)[0]
    events = list(model.stream("a seven", **DENOISE))
    found = [part if isinstance(part, str) else np.asarray(part).astype(int) for part in answer.parts]
    assert_same(found, [part for part in parts(events) if not isinstance(part, str) or part])
    assert answer.text == str(answer) == "".join(part for part in answer.parts if isinstance(part, str))
    assert len(answer.images) == 2 and all(isinstance(image, Image.Image) for image in answer.images)
    done = events[-1]
    assert (answer.num_prompt_tokens, answer.num_new_tokens) == (done.num_prompt_tokens, done.num_new_tokens)
