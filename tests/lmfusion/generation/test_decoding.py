"""Sampling follows the probabilities; streamed text has whole characters and ends at stop strings."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lmfusion.generation.decoding import NO_TOKEN, SamplingParams, TextStream, next_tokens, random_generator


def choose(logits, temperature=1.0, top_p=1.0, top_k=10**6, allow_boi=True, seed=0):
    """One token for each row of `logits` over the vocabulary; BOI and EOI get logits that would win."""
    num_rows = logits.shape[0]
    markers = torch.full((num_rows, 2), 50.0)
    uniform = torch.rand(num_rows, generator=random_generator(seed, 0))
    numbers = (torch.full((num_rows,), float(value)) for value in (allow_boi, temperature, top_p, top_k))
    return next_tokens(torch.cat([logits, markers], dim=1), SamplingParams(*numbers, uniform), temperature == 0)


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)


def test_chance_follows_probabilities():
    counts = choose(LOGITS, allow_boi=False).bincount(minlength=4)
    expected = LOGITS[0].softmax(0) * 4000
    assert counts.shape == (4,) and ((counts - expected).abs() < 5 * expected.sqrt()).all()


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({"top_p": 0.7}, [True, True, False, False]),
        ({"top_k": 3}, [True, True, True, False]),
        ({"top_k": 3, "top_p": 0.7}, [True, True, False, False]),
        ({"top_k": 3, "top_p": 0.98}, [True, True, True, False]),
        ({"top_p": 1e-6}, [True, False, False, False]),
        ({"top_k": 1}, [True, False, False, False]),
        ({"temperature": 0.01}, [True, False, False, False]),
        ({"temperature": 0}, [True, False, False, False]),
    ],
)
def test_only_the_likeliest_are_possible(settings, possible):
    counts = choose(LOGITS, allow_boi=False, **settings).bincount(minlength=4)
    assert (counts > 0).tolist() == possible


def test_boi_may_be_chosen_where_an_image_may_come_and_eoi_never():
    assert (choose(LOGITS) == 4).all()
    assert (choose(LOGITS, temperature=0) == 4).all()
    assert (choose(LOGITS, allow_boi=False) < 4).all()


@pytest.mark.parametrize("temperature", [0, 1e-3, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_choose_no_token(temperature, broken):
    logits = torch.zeros(4, 4)
    logits[:3] = broken
    logits[1:3, 2] = 1.0
    logits[2, 3] = 0.5
    logits[3, 1] = 90.0
    ids = choose(logits, temperature, allow_boi=False).tolist()
    assert ids[0] == NO_TOKEN and ids[3] == 1  # beside broken ones
    assert ids[1] == (2 if broken == -float("inf") else NO_TOKEN)  # minus infinity says that a token cannot come
    assert ids[2] in ((2, 3) if broken == -float("inf") else (NO_TOKEN,))
    begin = choose(logits, temperature).tolist()
    assert begin[3] in (1, 4) and begin[0] == (4 if broken == -float("inf") else NO_TOKEN)


def test_rows_of_unlike_settings_do_not_mix():
    logits = torch.randn(64, 30, generator=torch.Generator().manual_seed(0))
    settings = [(0.0, 1.0, 99.0), (1.0, 0.9, 99.0), (0.7, 1.0, 5.0), (2.0, 0.5, 7.0)] * 16
    uniform = torch.rand(64, generator=random_generator(1))
    allow_boi = torch.zeros(64)
    columns = [torch.tensor(column) for column in zip(*settings, strict=True)]
    together = next_tokens(logits, SamplingParams(allow_boi, *columns, uniform), False)
    for i, (temperature, top_p, top_k) in enumerate(settings):
        one = SamplingParams(*(torch.tensor([value]) for value in (0.0, temperature, top_p, top_k)), uniform[i : i + 1])
        assert next_tokens(logits[i : i + 1], one, temperature == 0) == together[i]
    greedy = torch.arange(64) % 4 == 0
    assert (together[greedy] == logits[greedy][:, :-2].argmax(1)).all()


def test_generators_are_keyed_by_seed_and_key():
    keys = [(0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 0, 2)]
    first = [torch.rand((), generator=random_generator(*key)).item() for key in keys]
    assert first == [torch.rand((), generator=random_generator(*key)).item() for key in keys]
    assert len(set(first)) == len(keys)


TEXT = "naïve 猫 and 👩‍🚀 said: done, and so on"


def stream(tokenizer, text, stop_strings=()):
    """The text that each token of `text` adds, and the rest."""
    growing = TextStream(tokenizer, stop_strings)
    shown = [growing.push(token_id) for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return shown, growing.finish(), growing.is_stopped


def test_text_comes_in_whole_characters(tokenizer):
    shown, rest, _ = stream(tokenizer, TEXT)  # a token a byte
    assert "".join(shown) == TEXT and rest == ""
    assert all("�" not in text for text in shown) and shown.count("") == len(TEXT.encode()) - len(TEXT)
    assert [len(text) for text in shown if text] == [1] * len(TEXT)


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    growing = TextStream(tokenizer)
    ids = tokenizer("a猫", add_special_tokens=False)["input_ids"]
    assert [growing.push(token_id) for token_id in ids[:-1]] == ["a", "", ""]
    assert growing.finish() == "�"
    assert growing.push(ids[0]) == "a"  # a new stretch


@pytest.mark.parametrize(
    ("stop_strings", "expected"),
    [
        (["done"], "naïve 猫 and 👩‍🚀 said: "),
        (["done", "said"], "naïve 猫 and 👩‍🚀 "),
        (["and"], "naïve 猫 "),
        (["and so"], "naïve 猫 and 👩‍🚀 said: done, "),
        (["猫"], "naïve "),
        (["n"], ""),
        (["onward", "on the"], TEXT),
    ],
)
def test_stop_strings(tokenizer, stop_strings, expected):
    shown, rest, is_stopped = stream(tokenizer, TEXT, stop_strings)
    assert "".join(shown) + rest == expected and is_stopped == (expected != TEXT)
    so_far = ""
    for text in shown:  # nothing shown is taken back
        so_far += text
        assert expected.startswith(so_far)


def test_spaces_at_the_seam_of_prompt_and_answer_are_kept():
    """Tokenizers like Llama 2's write a space before every word, except at the start of a text."""
    vocabulary = {"<unk>": 0, "▁The": 1, "▁sky": 2, "▁is": 3, "▁blue": 4}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.decoder = decoders.Metaspace()
    own = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    growing = TextStream(own, before=[3])
    assert own.decode([1, 2, 3]) + growing.push(4) == "The sky is blue"
    assert growing.push(3) == " is" and growing.finish() == ""
    assert TextStream(own).push(4) == "blue"


def test_control_tokens_are_not_text(tokenizer):
    growing = TextStream(tokenizer)
    assert growing.push(tokenizer.eos_token_id) + growing.push(tokenizer("x")["input_ids"][-1]) == "x"
