"""Shuffles: everything once, near to each other in storage where that is asked for, and always the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmfusion.data.pipeline.mixture import PERIOD, Mixture, quotas
from lmfusion.data.pipeline.order import BlockPermutation, Permutation, SourceOrder
from lmfusion.utils.randomness import generator

SEEDS = st.integers(0, 2**40)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), SEEDS, st.integers(0, 5))
def test_permutation_visits_everything_once(size, seed, epoch):
    assert sorted(Permutation(size, seed, epoch).take(np.arange(size))) == list(range(size))


def test_permutation_shuffles_and_changes_with_the_epoch():
    size = 1000
    orders = [Permutation(size, 0, epoch).take(np.arange(size)).tolist() for epoch in range(2)]
    for order in (*orders, [orders[0].index(i) for i in orders[1]]):
        assert abs(np.corrcoef(order, range(size))[0, 1]) < 0.1
        assert sum(i == position for position, i in enumerate(order)) < 10
    with pytest.raises(IndexError, match=r"positions must be in \[0, 1000\), got 1000"):
        Permutation(size, 0, 0)[size]


def test_permutation_stays_what_it_was():
    """Runs and held-out splits that exist depend on it."""
    assert Permutation(10, seed=7, epoch=1).take(np.arange(10)).tolist() == GOLDEN
    assert [Permutation(10, 7, 1)[i] for i in range(10)] == GOLDEN


GOLDEN = [6, 8, 1, 0, 9, 3, 5, 2, 4, 7]


def test_permutation_of_a_huge_set_needs_no_memory():
    order = Permutation(10**12, 0, 0)
    assert len(set(order.take(np.arange(10**11, 10**11 + 1000)).tolist())) == 1000


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 8), SEEDS)
def test_blocks_are_shuffled_and_read_in_groups(blocks, group_size, seed):
    size = sum(blocks)
    sizes = np.array(blocks, np.int64)
    order = BlockPermutation(sizes, group_size, seed, 0).take(np.arange(size))
    assert sorted(order) == list(range(size))
    block_of = np.repeat(np.arange(len(blocks)), blocks)[order]
    for block in range(len(blocks)):  # from its first sample to its last, no more blocks are open than a group has
        at = np.flatnonzero(block_of == block)
        if at.size:
            assert len(set(block_of[at[0] : at[-1] + 1])) <= group_size


def test_groups_of_blocks_are_shuffled_inside_and_among_each_other():
    sizes = np.full(40, 25, np.int64)
    order = BlockPermutation(sizes, 4, seed=1, epoch=0).take(np.arange(1000))
    first_group = order[:100] // 25
    assert len(set(first_group.tolist())) == 4 and (np.diff(first_group) != 0).sum() > 50
    visited = list(dict.fromkeys((order // 25).tolist()))
    assert visited != sorted(visited)
    within = BlockPermutation(sizes, 1, seed=1, epoch=0).take(np.arange(1000)).reshape(40, 25) % 25
    assert len({tuple(of_block) for of_block in within}) == 40
    assert (BlockPermutation(sizes, 4, seed=1, epoch=1).take(np.arange(1000)) != order).any()


@pytest.mark.parametrize("shuffle_blocks", [None, 2])
def test_a_source_is_shuffled_again_each_epoch(shuffle_blocks):
    order = SourceOrder([5, 7, 0, 8, 3], shuffle_blocks, seed=2)
    epochs, indices = order.take(np.arange(69))
    assert epochs.tolist() == sorted([0, 1, 2] * 23)
    by_epoch = indices.reshape(3, 23)
    for of_epoch in by_epoch:
        assert sorted(of_epoch) == list(range(23))
    assert len({tuple(of_epoch) for of_epoch in by_epoch}) == 3
    scattered = np.array([68, 3, 24, 3])
    assert order.take(scattered)[1].tolist() == indices[scattered].tolist()


def test_draws_depend_on_their_key_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    draw = generator(1, 2, "a", "noise").random(3)
    assert (draw == generator(1, 2, "a", "noise").random(3)).all()
    for other in [(2, 2, "a", "noise"), (1, 3, "a", "noise"), (1, 2, "b", "noise"), (1, 2, "a", "document")]:
        assert (draw != generator(*other).random(3)).all()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


# Mixtures


def mixture(sizes, weights, seed=0):
    return Mixture([SourceOrder([size], None, seed, f"source {i}") for i, size in enumerate(sizes)], weights, seed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.02, 1.0), min_size=1, max_size=12))
def test_quotas_are_the_shares_rounded(weights):
    counts = quotas(weights)
    assert sum(counts) == PERIOD
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - PERIOD * weight / sum(weights)) < 1


def test_every_period_has_exactly_the_shares():
    mixed = mixture([70, 3000, 11], [0.7, 0.2, 0.1])
    for period in range(3):
        draws = mixed.samples(range(period * PERIOD, (period + 1) * PERIOD))
        assert [sum(draw.source == source for draw in draws) for source in range(3)] == [700, 200, 100]
    sources = [draw.source for draw in mixed.samples(range(100))]
    assert 50 < sources.count(0) < 90 and sources != sorted(sources)  # shuffled within the period


def test_each_source_of_a_mixture_keeps_its_own_epochs():
    draws = mixture([70, 30], [1.0, 3.0]).samples(range(2 * PERIOD))
    for source, size in enumerate((70, 30)):
        own = [draw for draw in draws if draw.source == source]
        for i in range(0, len(own) - size, size):
            epoch = own[i : i + size]
            assert {draw.epoch for draw in epoch} == {i // size}
            assert sorted(draw.index for draw in epoch) == list(range(size))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 1500))
def test_a_draw_depends_on_its_position_alone(first, length):
    mixed = mixture([70, 300], [0.35, 0.65])
    draws = mixed.samples(range(first, first + length))
    middle = length // 2
    assert mixed.samples(range(first + middle, first + middle + 1)) == [draws[middle]]


def test_sources_of_one_size_are_not_read_in_one_order():
    draws = mixture([500, 500], [1, 1]).samples(range(PERIOD))
    orders = [[draw.index for draw in draws if draw.source == source] for source in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_a_weight_too_small_for_a_place_is_refused():
    with pytest.raises(ValueError, match=r"data\.sources\[1\] must be at least 1 in 1000 samples, got 0\.0001"):
        mixture([5, 5], [1.0, 0.0001])
