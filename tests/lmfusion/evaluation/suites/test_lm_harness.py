"""Settings of lm-evaluation-harness's tasks are read as its own models read them, or refused."""

import pytest
from lm_eval.models.utils import normalize_gen_kwargs

from lmfusion.evaluation.suites.lm_harness import LMFusionLM
from tests.lmfusion.generation.models import build
from tests.lmfusion.text.templates import DATED


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return LMFusionLM(build(tiny_llama))


def options(lm, **settings):
    return lm._options(settings)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": False},
        {"do_sample": False, "temperature": 0.0},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.9},
        {"temperature": 0},
        {"temperature": 1},
        {"do_sample": True, "temperature": 0.2, "top_p": 0.95},
        {"do_sample": None, "temperature": 0.5},
        {"max_gen_toks": 7},
        {"max_new_tokens": 7},
        {"max_tokens": "7"},
        {"max_gen_toks": 5, "max_new_tokens": 7},
        {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0},
        {"early_stopping": True, "use_cache": True, "no_repeat_ngram_size": 0, "min_length": 0, "typical_p": 1.0},
        {"until": None, "num_beams": None},
    ],
)
def test_settings_are_read_as_its_own_models_read_them(lm, settings):
    theirs = normalize_gen_kwargs({k: v for k, v in settings.items() if v is not None}, 256)
    ours = options(lm, **settings)
    assert ours["max_new_tokens"] == theirs["max_gen_toks"]
    assert ours["do_sample"] == theirs["do_sample"]
    assert ours["temperature"] == (theirs["temperature"] if theirs["do_sample"] else 0.0)
    assert ours["top_p"] == (settings.get("top_p", 1.0) if theirs["do_sample"] else 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 10}, "num_beams in generation_kwargs of a task must be 1 or left out, got 10"),
        ({"repetition_penalty": 1.2}, "must be 1 or left out, got 1.2"),
        ({"presence_penalty": 0.5}, "must be 0 or left out, got 0.5"),
        ({"nonsense": 1}, "must have keys out of do_sample, .* got 'nonsense'"),
    ],
)
def test_settings_with_an_effect_are_refused(lm, settings, message):
    with pytest.raises(ValueError, match=message):
        options(lm, **settings)


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (["Question:", "</s>", "<|im_end|>"], ["</s>", "Question:", "<|im_end|>"]),
        ("\n", ["\n"]),
        ([], []),
        ([""], []),
        (["x"] * 20 + ["</s>"], ["</s>"] + ["x"] * 15),
    ],
)
def test_stop_strings(lm, until, expected):
    assert options(lm, until=until)["stop_strings"] == expected
    [text] = lm._generate(["The sky"], {"until": until, "max_gen_toks": 4})
    assert all(stop not in text for stop in ([until] if isinstance(until, str) else until) if stop)


def test_conversations_do_not_depend_on_the_day(lm, monkeypatch):
    monkeypatch.setattr(lm.tokenizer, "chat_template", DATED)
    turns = [{"role": "user", "content": "Hi."}]
    prompt = lm.apply_chat_template(turns)
    assert prompt == "Today is 26 Jul 2024. <|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    begun = [*turns, {"role": "assistant", "content": "I say "}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == prompt + "I say "
    monkeypatch.setattr(lm.model.config, "template_variables", {"today": "2025-01-02"})
    assert lm.apply_chat_template(turns).startswith("Today is 02 Jan 2025.")
