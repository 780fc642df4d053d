"""The byte-bounded cache: what it keeps, what it forgets, and that threads make each value once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmfusion.utils.byte_cache import ByteCache


def test_cache_forgets_the_least_recently_used_and_makes_each_once():
    cache, made = ByteCache(10), []

    def make(name, size):
        return lambda: (made.append(name) or name, size)

    assert [cache.get(name, make(name, 4)) for name in "abacab"] == list("abacab")
    assert made == ["a", "b", "c", "b"]  # b was forgotten for c
    assert cache.get("huge", make("huge", 99)) == "huge" and cache.get("huge", make("huge", 99)) == "huge"
    assert made.count("huge") == 1
    with pytest.raises(ZeroDivisionError):
        cache.get("x", lambda: (1 / 0, 1))
    assert cache.get("x", make("x", 1)) == "x"
    slow, started = [], threading.Barrier(4)

    def once():
        slow.append(1)
        time.sleep(0.05)
        return "slow", 1

    def ask(_):
        started.wait()
        return cache.get("slow", once)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == ["slow"] * 4
    assert slow == [1]


def test_without_eviction_what_came_first_stays():
    cache, made = ByteCache(10, evicts=False), []

    def get(name, size):
        return cache.get(name, lambda: (made.append(name) or name, size))

    assert [get("a", 4), get("big", 7), get("b", 6), get("c", 1)] == ["a", "big", "b", "c"]
    made.clear()
    assert [get("a", 4), get("b", 6)] == ["a", "b"] and made == []
    assert [get("big", 7), get("c", 1)] == ["big", "c"] and made == ["big", "c"]


@pytest.mark.parametrize("evicts", [True, False])
def test_a_value_without_a_size_is_not_kept(evicts):
    cache, made = ByteCache(10, evicts=evicts), []
    for _ in range(2):
        assert cache.get("a", lambda: (made.append(1) or "a", None)) == "a"
    assert len(made) == 2


def test_an_error_reaches_every_thread_that_waits():
    cache, started = ByteCache(10), threading.Barrier(3)

    def fail():
        time.sleep(0.05)
        raise ValueError("torn")

    def get(_):
        started.wait()
        with pytest.raises(ValueError, match="torn"):
            cache.get("a", fail)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(get, range(3)))
    assert cache.get("a", lambda: ("whole", 1)) == "whole"
