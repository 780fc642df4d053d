"""pack_documents: every document once, no sequence too full, the same result everywhere, little padding, bad input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmfusion_kernels as lk
from lmfusion_kernels.layout import build

lengths_and_windows = st.tuples(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40), st.integers(1, 70))


@given(lengths_and_windows)
def test_every_document_is_in_one_row_that_has_room(arguments):
    lengths, capacity, window = arguments
    rows = lk.pack_documents(lengths, capacity, window)
    assert sorted(np.concatenate([*rows, []]).tolist()) == list(range(len(lengths)))
    for row in rows:
        assert row.dtype == np.int64
        assert row.tolist() == sorted(row)
        assert sum(lengths[i] for i in row) <= capacity
        assert row[0] // window == row[-1] // window, "a row reaches outside its window"
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@pytest.mark.skipif(build._layout_native is None, reason="_layout_native was not compiled")
@given(lengths_and_windows)
def test_compiled_packer_equals_python(arguments):
    lengths, capacity, window = arguments
    lengths = np.array(lengths, np.int64)
    compiled = build._layout_native.pack(lengths, capacity, window)
    expected = build.pack_python(lengths, capacity, window)
    assert [row.tolist() for row in compiled] == [row.tolist() for row in expected]


@given(lengths_and_windows)
def test_a_stream_can_be_packed_window_by_window(arguments):
    lengths, capacity, window = arguments
    whole = lk.pack_documents(lengths, capacity, window)
    parts = []
    for begin in range(0, len(lengths), window):
        parts += [row + begin for row in lk.pack_documents(lengths[begin : begin + window], capacity, window)]
    assert [row.tolist() for row in parts] == [row.tolist() for row in whole]


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        # Best fit: 6 and 4, 5 with 3 and 2. Dealt out, 6 with 3 and 5 with 4 would leave no room for 2
        ([3, 6, 4, 5, 2], [[0, 3, 4], [1, 2]]),
        # Best fit would fill a row with 6 and 4 and leave 3 and 2 to another; dealt out, 6 with 2 and 4 with 3
        ([6, 4, 3, 2], [[0, 3], [1, 2]]),
    ],
)
def test_by_hand(lengths, rows):
    assert [row.tolist() for row in lk.pack_documents(lengths, 10)] == rows


def test_few_slots_stay_empty():
    lengths = np.random.default_rng(0).integers(50, 1000, 4096)
    rows = lk.pack_documents(lengths, 4096)
    assert lengths.sum() / (4096 * len(rows)) > 0.97


def test_small_documents_are_dealt_out_evenly():
    lengths = np.random.default_rng(0).integers(15, 30, 1024)
    rows = lk.pack_documents(lengths, 2048)
    tokens = np.array([lengths[row].sum() for row in rows])
    assert tokens.max() - tokens.min() < 30
    assert all(np.ptp(lengths[row]) > 10 for row in rows)


@pytest.mark.parametrize(
    ("lengths", "capacity", "window", "message"),
    [
        ([5, 12, 3], 10, 8, "at most the capacity of 10 tokens, got 12 for document 1"),
        ([5, 0], 10, 8, "lengths must be positive, got 0 for document 1"),
        ([5, -2], 10, 8, "lengths must be positive, got -2 for document 1"),
        ([5], 0, 8, "capacity of 0"),
        ([5], 10, 0, "window must be at least 1 document, got 0"),
        ([1.5], 10, 8, "lengths must be integers"),
        ([[1, 2]], 10, 8, r"of shape \(1, 2\)"),
    ],
)
def test_bad_input(lengths, capacity, window, message):
    with pytest.raises(ValueError, match=message):
        lk.pack_documents(lengths, capacity, window)
