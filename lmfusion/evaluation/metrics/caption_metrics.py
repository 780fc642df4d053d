"""CIDEr-D, BLEU-4 and ROUGE-L of captions against reference captions, as in the COCO caption evaluation.

| score | what it compares | over many captions |
| --- | --- | --- |
| CIDEr-D (Vedantam et al. 2015, section 6) | n-grams, weighted by how rare they are; 0 to 10 | mean |
| BLEU-4 (Papineni et al. 2002) | n-grams and lengths; 0 to 1 | from the sums over all captions |
| ROUGE-L (Lin 2004, section 3) | longest common subsequence; 0 to 1 | mean |

Papers print 100 times these numbers. They equal those of pycocoevalcap for the same words; words come from
`lmfusion.evaluation.metrics.ptb_tokenizer`. CIDEr-D weights n-grams by how rare they are in the given references. So it
can only be compared over the same set of images, and it is 0 for a single image.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmfusion.evaluation.metrics.ptb_tokenizer import tokenize

MAX_N = 4
"""Number of words of the longest n-grams."""
CIDER_SIGMA = 6.0
"""Standard deviation of the Gaussian penalty of CIDEr-D for a difference in length, in words."""
ROUGE_BETA = 1.2
"""Weight of recall relative to precision."""

TINY, SMALL = 1e-15, 1e-9
"""The COCO evaluation adds these to the counts and totals of BLEU to avoid division by zero."""

Words = Sequence[str]
NGram = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class CaptionScores:
    """Scores of captions, and the values that `lmfusion.evaluation.metrics.bootstrap` needs for their intervals."""

    cider_d: float
    bleu_4: float
    rouge_l: float
    cider_d_by_image: np.ndarray
    """float64 [n]. Every resample uses the rarity of n-grams in all references."""
    rouge_l_by_image: np.ndarray
    """float64 [n]"""
    bleu_counts: np.ndarray
    """int64 [n, 10]. `bleu` maps them, or some of their rows, to the score."""


def score_captions(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Scores of one caption per image against the references of the image, one or more.

    Raises ValueError for no captions, for a different number of images in both arguments, and for no references.
    """
    for i, refs in enumerate(references):
        if isinstance(refs, str):
            raise ValueError(f"references of image {i} must be a list of captions, got the text {refs!r}")
    return score_words([tokenize(c) for c in candidates], [[tokenize(r) for r in refs] for refs in references])


def score_words(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> CaptionScores:
    """`score_captions` for captions that are already split into words."""
    if len(candidates) == 0 or len(candidates) != len(references):
        raise ValueError(
            f"captions and references must be for the same images, at least one, got {len(candidates)} captions and "
            f"references of {len(references)} images"
        )
    for i, refs in enumerate(references):
        if len(refs) == 0:
            raise ValueError(f"image {i} must have at least one reference, got none; give one, or leave the image out")
    cider_d = _cider_d(candidates, references)
    counts = np.array([_bleu_counts(c, refs) for c, refs in zip(candidates, references, strict=True)])
    rouge_l = np.array([_rouge_l(c, refs) for c, refs in zip(candidates, references, strict=True)])
    return CaptionScores(float(cider_d.mean()), bleu(counts), float(rouge_l.mean()), cider_d, rouge_l, counts)


def bleu(counts: np.ndarray) -> float:
    """BLEU-4 from `CaptionScores.bleu_counts` [n, 10]."""
    totals = counts.sum(axis=0)
    matched, found = totals[:MAX_N], totals[MAX_N : 2 * MAX_N]
    length, reference_length = totals[2 * MAX_N :]
    precision = float(np.prod((matched + TINY) / (found + SMALL))) ** (1 / MAX_N)
    ratio = (length + TINY) / (reference_length + SMALL)
    return precision * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def ngrams(words: Words) -> Counter[NGram]:
    """The number of times that each n-gram of up to four words occurs."""
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _bleu_counts(candidate: Words, references: Sequence[Words]) -> list[int]:
    """Counts of one caption: for each n the n-grams that match a reference, for each n all n-grams, the caption's
    words, and the words of the reference of nearest length (of two equally near ones the shorter).

    An n-gram matches at most as often as it occurs in the reference that has it most often.
    """
    highest: Counter[NGram] = Counter()
    for reference in references:
        highest |= ngrams(reference)
    matched, found = [0] * MAX_N, [0] * MAX_N
    for ngram, count in ngrams(candidate).items():
        found[len(ngram) - 1] += count
        matched[len(ngram) - 1] += min(count, highest[ngram])
    length = len(candidate)
    nearest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    return [*matched, *found, length, nearest]


def _rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    if not candidate:
        return 0.0
    common = [_longest_common(candidate, reference) for reference in references]
    precision = max(common) / len(candidate)
    recall = max(c / max(1, len(reference)) for c, reference in zip(common, references, strict=True))
    if precision == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common(a: Words, b: Words) -> int:
    """Number of words of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


class _Vector(NamedTuple):
    """A caption as a vector of n-grams, for CIDEr-D."""

    weights: list[dict[NGram, float]]
    """For each n: how often each n-gram occurs, times how rare it is (TF-IDF)."""
    norms: list[float]
    length: int
    """Number of 2-grams, by which the COCO evaluation measures length."""


def _cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """CIDEr-D of each caption, float64 [n]: equation 6 of the paper, times 10."""
    counted = [[ngrams(reference) for reference in refs] for refs in references]
    num_images_with: Counter[NGram] = Counter()
    for refs in counted:
        num_images_with.update(set().union(*refs))
    log_num_images = math.log(len(counted))

    def vector(counts: Counter[NGram]) -> _Vector:
        weights: list[dict[NGram, float]] = [{} for _ in range(MAX_N)]
        length = 0
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (log_num_images - math.log(max(1, num_images_with[ngram])))
            length += count if len(ngram) == 2 else 0
        return _Vector(weights, [math.sqrt(sum(w * w for w in of.values())) for of in weights], length)

    scores = []
    for candidate, refs in zip(candidates, counted, strict=True):
        of_candidate = vector(ngrams(candidate))
        total = sum(_similarity(of_candidate, vector(reference)) for reference in refs)
        scores.append(10 * total / (MAX_N * len(refs)))
    return np.array(scores)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """Sum over n. Counts are clipped to the reference's, so repeating a word gains nothing."""
    total = 0.0
    for of_candidate, of_reference, a, b in zip(
        candidate.weights, reference.weights, candidate.norms, reference.norms, strict=True
    ):
        product = sum(
            min(w, of_reference.get(ngram, 0.0)) * of_reference.get(ngram, 0.0) for ngram, w in of_candidate.items()
        )
        total += product / (a * b) if a and b else product
    difference = candidate.length - reference.length
    return total * math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
