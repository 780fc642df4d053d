"""Captions get the scores of the COCO evaluation for the same words."""

import math

import numpy as np
import pytest

from lmfusion.evaluation.metrics.bootstrap import bootstrap
from lmfusion.evaluation.metrics.caption_metrics import bleu, score_captions, score_words
from lmfusion.evaluation.metrics.ptb_tokenizer import tokenize

NOUNS = ["dog", "cat", "bus", "man", "woman", "kite", "wave", "board", "street", "pizza"]
VERBS = ["rides", "holds", "watches", "eats", "chases"]
COLOURS = ["red", "blue", "green", "yellow"]


def write(generator):
    words = ["a", generator.choice(COLOURS), generator.choice(NOUNS), generator.choice(VERBS), "a"]
    words += [generator.choice(NOUNS), *generator.choice(NOUNS, size=generator.integers(0, 6))]
    return [str(word) for word in words]


def corpus(num_images=40, seed=0):
    generator = np.random.default_rng(seed)
    references = [[write(generator) for _ in range(generator.integers(1, 6))] for _ in range(num_images)]
    candidates = [list(refs[0]) if i % 3 == 0 else write(generator) for i, refs in enumerate(references)]
    candidates[4], candidates[5] = ["dog"], ["a", "dog", "zebra"]
    candidates[7] = candidates[7] * 3
    candidates[8] = []
    return candidates, references


def scores_of_pycocoevalcap(candidates, references):
    modules = [pytest.importorskip(f"pycocoevalcap.{name}.{name}") for name in ("bleu", "cider", "rouge")]
    results = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    truth = {i: [" ".join(words) for words in refs] for i, refs in enumerate(references)}
    (of_bleu, _), (_, cider), (_, rouge) = (
        modules[0].Bleu(4).compute_score(truth, results, verbose=0),
        modules[1].Cider().compute_score(truth, results),
        modules[2].Rouge().compute_score(truth, results),
    )
    return of_bleu[3], cider, rouge


@pytest.mark.parametrize("num_images", [10, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_pycocoevalcap(num_images, seed):
    candidates, references = corpus(num_images, seed)
    bleu_4, cider, rouge = scores_of_pycocoevalcap(candidates, references)
    scores = score_words(candidates, references)
    assert scores.bleu_4 == pytest.approx(bleu_4, rel=1e-12)
    np.testing.assert_allclose(scores.cider_d_by_image, cider, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scores.rouge_l_by_image, rouge, rtol=1e-12)
    assert scores.cider_d == pytest.approx(np.mean(cider), rel=1e-9)
    assert scores.rouge_l == pytest.approx(np.mean(rouge), rel=1e-12)


def test_equal_to_pycocoevalcap_if_nothing_matches():
    candidates, references = [["dog"], ["cat"]], [[["red", "bus"]], [["a", "blue", "kite"], ["wave"]]]
    bleu_4, cider, rouge = scores_of_pycocoevalcap(candidates, references)
    scores = score_words(candidates, references)
    assert scores.bleu_4 == pytest.approx(bleu_4, rel=1e-9)
    assert scores.bleu_4 < 1e-6
    assert cider.tolist() == scores.cider_d_by_image.tolist() == [0, 0]
    assert rouge.tolist() == scores.rouge_l_by_image.tolist() == [0, 0]


def test_by_hand():
    scores = score_words([["the", "cat", "sat"], ["dogs", "run", "fast", "now"]], [[["the", "cat", "ran"]], [["x"]]])
    precision = recall = 2 / 3
    of_first = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert scores.rouge_l_by_image == pytest.approx([of_first, 0])
    assert scores.bleu_counts.tolist() == [[2, 1, 0, 0, 3, 2, 1, 0, 3, 3], [0, 0, 0, 0, 4, 3, 2, 1, 4, 1]]
    # Of the three pairs and words that the first has, "the", "cat" and "the cat" fit; all are as rare
    assert scores.cider_d_by_image[0] == pytest.approx(10 / 4 * (2 / 3 + 1 / 2))


def test_perfect_captions_get_the_highest_scores():
    captions = ["A man rides a red bike.", "Two dogs sleep on the old couch.", "The kitchen has a stove and a sink."]
    scores = score_captions(captions, [[caption] for caption in captions])
    assert (scores.cider_d, scores.bleu_4, scores.rouge_l) == pytest.approx((10, 1, 1), rel=1e-6)


def test_short_captions_are_penalised():
    long = [["a", "b", "c", "d", "e", "f", "g", "h"]] * 2
    scores = score_words([words[:5] for words in long], [[words] for words in long])
    assert scores.bleu_4 == pytest.approx(math.exp(1 - 8 / 5), rel=1e-6)


def test_intervals_of_all_three():
    candidates, references = corpus()
    scores = score_words(candidates, references)
    for value, low, high in (
        (scores.cider_d, *bootstrap(scores.cider_d_by_image, num_resamples=200)),
        (scores.rouge_l, *bootstrap(scores.rouge_l_by_image, num_resamples=200)),
        (scores.bleu_4, *bootstrap(scores.bleu_counts, bleu, num_resamples=200)),
    ):
        assert low < value < high


def test_captions_are_tokenized():
    captions, references = ["A Dog!", "it's red"], [["a dog", "the dog"], ["It 's RED."]]
    expected = score_words([["a", "dog"], ["it", "'s", "red"]], [[["a", "dog"], ["the", "dog"]], [["it", "'s", "red"]]])
    assert score_captions(captions, references).cider_d == expected.cider_d
    assert tokenize(captions[1]) == ["it", "'s", "red"]


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "got 0 captions and references of 0 images"),
        (["a"], [["a"], ["b"]], "got 1 captions and references of 2 images"),
        (["a", "b"], [["a"], []], "image 1 must have at least one reference"),
        (["a", "b"], ["a", ["b"]], "references of image 0 must be a list of captions, got the text 'a'"),
    ],
)
def test_bad_captions_are_refused(candidates, references, message):
    with pytest.raises(ValueError, match=message):
        score_captions(candidates, references)
