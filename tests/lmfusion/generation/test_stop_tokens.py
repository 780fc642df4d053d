"""Stop strings that are control tokens, or look like them."""

import pytest

from lmfusion.generation import GenerationOptions
from tests.lmfusion.generation.models import build


@pytest.fixture(scope="module")
def model(tiny_llama):
    return build(tiny_llama)


def answer(model, monkeypatch, ids, **options):
    """The answer of `generate` if the tokens `ids` are sampled one after the other."""
    waiting = iter(ids)
    monkeypatch.setattr(
        "lmfusion.generation.device_steps.next_tokens", lambda logits, *_: logits.argmax(-1) * 0 + next(waiting)
    )
    monkeypatch.setattr(
        "lmfusion.generation.engine.next_tokens", lambda logits, *_: logits.argmax(-1) * 0 + next(waiting)
    )
    monkeypatch.setattr("lmfusion.generation.engine.end_token_ids", lambda model: set())
    return model.generate(["x"], max_new_tokens=len(ids), **options)[0]


@pytest.mark.parametrize(
    ("stop_strings", "text"),
    [
        (["</s>"], "ab"),
        (["Question:", "</s>", "<|im_end|>"], "ab"),
        (["</s>\n"], "ab"),
        (["</s>", "</s>"], "ab"),
        (["<s>"], "abcd"),
        (["<|im_end|>"], "abcd"),  # no token of this tokenizer
        ([], "abcd"),
        ([" "], "abcd"),
        (["bc", "</s>"], "ab"),
        (["bc"], "a"),
    ],
)
def test_answers_stop_at_the_token(model, monkeypatch, stop_strings, text):
    ids = [*model.tokenizer("ab", add_special_tokens=False)["input_ids"], model.tokenizer.eos_token_id]
    ids += model.tokenizer("cd", add_special_tokens=False)["input_ids"]
    found = answer(model, monkeypatch, ids, stop_strings=stop_strings)
    assert found.text == text
    assert found.finish_reason == ("length" if text == "abcd" else "stop")


def test_strings_that_look_like_control_tokens_are_text(model, monkeypatch):
    ids = model.tokenizer("a<|im_end|>b", add_special_tokens=False)["input_ids"]
    found = answer(model, monkeypatch, ids, stop_strings=["<|im_end|>"])
    assert (found.text, found.finish_reason) == ("a", "stop")
    spelled = [model.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "a</s>b"]
    assert answer(model, monkeypatch, spelled, stop_strings=["</s>"]).text == "a"


@pytest.mark.parametrize("stop_strings", [[""], ["a", ""], "a", [5], ["x"] * 17])
def test_anything_but_a_list_of_texts_is_refused(stop_strings):
    with pytest.raises(ValueError, match="stop_strings"):
        GenerationOptions(stop_strings=stop_strings)


def test_a_control_token_behind_words_is_refused(model):
    with pytest.raises(
        ValueError, match="must not have text before a control token, got 'end</s>' with the control token '</s>'"
    ):
        model.generate(["x"], stop_strings=["end</s>"])
