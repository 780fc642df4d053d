"""Reading ahead: in order, a bounded number of items, and no thread left however the iterator ends."""

import threading
import time

import pytest

from lmfusion.utils.prefetch import map_threads, submit_ahead


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lmfusion-test")]


def test_results_come_in_order_and_the_threads_end():
    found = list(map_threads(lambda x: (time.sleep(0.01 * (x % 3)), x)[1], range(20), 4, name="test"))
    assert found == list(range(20)) and not threads()
    assert list(map_threads(str, [], 3, name="test")) == [] and not threads()


@pytest.mark.parametrize("num_ahead", [0, 1, 5])
def test_only_so_far_ahead(num_ahead):
    submitted = []
    for i, handle in enumerate(submit_ahead(lambda x: submitted.append(x) or x, range(20), num_ahead)):
        assert handle == i and len(submitted) == min(20, i + 1 + num_ahead)


def test_closing_drops_what_has_not_begun():
    begun = []

    def work(x):
        begun.append(x)
        time.sleep(0.02)
        return x

    results = map_threads(work, range(100), 1, num_ahead=50, name="test")
    assert next(results) == 0
    results.close()
    assert len(begun) < 20 and not threads()


def test_the_first_error_is_raised_and_the_threads_end():
    def work(x):
        if x >= 3:
            raise ValueError(f"torn {x}")
        return x

    with pytest.raises(ValueError, match="torn 3"):
        list(map_threads(work, range(50), 3, name="test"))
    assert not threads()
