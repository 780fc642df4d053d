"""Texts are as likely as transformers' own Llama finds them, and lm-evaluation-harness gets the same answers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmfusion.evaluation.scoring import Likelihood, Window, rolling_windows, score_windows, text_loss

TEXTS = ["The sky is blue.", "a", "Wörter, 言葉 and words " * 20]


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@torch.no_grad()
def likelihood(llama, ids, num_scored):
    """By transformers, one text at a time."""
    log_probs = llama(torch.tensor([ids[:-1]])).logits[0, -num_scored:].log_softmax(-1)
    targets = torch.tensor(ids[-num_scored:])
    return Likelihood(float(log_probs.gather(1, targets[:, None]).sum()), bool((log_probs.argmax(-1) == targets).all()))


def test_windows_of_any_length_are_as_likely_as_in_transformers(tiny, llama):
    generator = torch.Generator().manual_seed(0)
    windows = [
        Window(torch.randint(3, 250, (length,), generator=generator).tolist(), num_scored)
        for length, num_scored in [(2, 1), (9, 8), (30, 4), (257, 20), (12, 3)]
    ]
    for batch_tokens in (1, 64, 4096):
        found = score_windows(tiny, windows, batch_tokens)
        for ours, (ids, num_scored) in zip(found, windows, strict=True):
            theirs = likelihood(llama, ids, num_scored)
            assert ours.log_prob == pytest.approx(theirs.log_prob, abs=1e-4)
            assert ours.is_greedy == theirs.is_greedy


def test_the_likeliest_continuation_is_greedy(tiny, llama):
    ids = [5, 6, 7]
    for _ in range(4):
        ids.append(int(llama(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 250]
    assert [found.is_greedy for found in score_windows(tiny, [Window(ids, 4), Window(other, 4)])] == [True, False]


def test_text_loss_is_transformers_cross_entropy(tiny, llama, tokenizer):
    total, count = 0.0, 0
    for text in TEXTS[:2]:
        ids = tokenizer(text)["input_ids"]  # bos first
        total -= likelihood(llama, ids, len(ids) - 1).log_prob
        count += len(ids) - 1
    assert text_loss(tiny, TEXTS[:2]) == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(ValueError, match="at least one token"):
        text_loss(tiny, [""])


def test_each_token_of_a_long_text_is_predicted_once():
    ids = list(range(100, 110))
    windows = rolling_windows(ids, 1, limit=4)
    assert windows == [
        Window([1, 100, 101, 102, 103], 4),
        Window([103, 104, 105, 106, 107], 4),
        Window([105, 106, 107, 108, 109], 2),
    ]
    assert rolling_windows([7], 1, limit=4) == [Window([1, 7], 1)]


def test_a_window_needs_a_token_to_score_and_one_before_it(tiny):
    for window in (Window([5], 1), Window([5, 6], 0), Window([5, 6], 2)):
        with pytest.raises(ValueError, match="num_scored must be at least 1 and below"):
            score_windows(tiny, [window])


@pytest.fixture(scope="module")
def models(tiny, llama, tokenizer):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lmfusion.evaluation.suites.lm_harness import LMFusionLM

    theirs = huggingface.HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=2, device="cpu")
    return LMFusionLM(tiny, batch_tokens=300), theirs


class TestHarness:
    """`LMFusionLM` beside lm-evaluation-harness's own wrapper of transformers, on the same weights."""

    @staticmethod
    def requests(kind, arguments):
        from lm_eval.api.instance import Instance

        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

    def test_loglikelihood(self, models):
        pairs = [("The sky is", " blue"), ("Question: what? ", "nothing"), ("", "empty"), ("long " * 70, "words " * 5)]
        ours, theirs = (model.loglikelihood(self.requests("loglikelihood", pairs)) for model in models)
        assert [answer[0] for answer in ours] == pytest.approx([answer[0] for answer in theirs], abs=1e-3)
        assert [answer[1] for answer in ours] == [answer[1] for answer in theirs]

    def test_loglikelihood_rolling(self, models):
        requests = self.requests("loglikelihood_rolling", [(text,) for text in TEXTS])
        ours, theirs = (model.loglikelihood_rolling(requests) for model in models)
        assert ours == pytest.approx(theirs, rel=1e-5)

    def test_generate_until(self, models):
        settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
        requests = self.requests("generate_until", [(text, settings) for text in ["The sky is", "One, two", TEXTS[2]]])
        ours, theirs = (model.generate_until(requests) for model in models)
        assert ours == theirs
        assert all(ours)
        stop = ours[0][3]
        [cut] = models[0].generate_until(self.requests("generate_until", [("The sky is", {**settings, "until": stop})]))
        assert cut == ours[0].split(stop)[0]

    def test_unsupported_settings_of_a_task_are_refused(self, models):
        with pytest.raises(ValueError, match="num_beams in generation_kwargs of a task must be 1 or left out, got 4"):
            models[0].generate_until(self.requests("generate_until", [("a", {"num_beams": 4})]))
        with pytest.raises(ValueError, match="below the LLM's context of 256 tokens, got 256"):
            models[0].generate_until(self.requests("generate_until", [("a", {"max_gen_toks": 256})]))
