"""The worker: any thread submits, one owns the engine; failures stay with their request; no caller waits forever."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmfusion.generation.events import Done, ImageBegin, ImageEnd, ImagePreview, TextDelta
from lmfusion.generation.worker import MAX_FAILED_STEPS, EngineWorker, QueueFull, Stopped
from tests.lmfusion.generation.fake_engine import NUM_STEPS, FakeEngine

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def worker(engine):
    worker = EngineWorker(engine, max_waiting=3)
    yield worker
    engine.gate.set()
    worker.close()


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_events_come_in_order_and_end_with_done(worker):
    events = list(worker.submit("ab#c", None))
    kinds = [TextDelta, TextDelta, ImageBegin, *[ImagePreview] * NUM_STEPS, ImageEnd, TextDelta, Done]
    assert [type(event) for event in events] == kinds
    assert text_of(events) == "abc" and events[-1].finish_reason == "stop"


def test_one_thread_owns_the_engine(engine):
    worker = EngineWorker(engine)
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda text: text_of(worker.submit(text, None)), [f"text {i}" for i in range(40)]))
    assert texts == [f"text {i}" for i in range(40)]
    assert engine.threads == {worker._thread.ident} and engine.max_running > 1
    worker.close()


def test_an_iterator_that_was_read_to_its_end_stays_ended(worker):
    stream = worker.submit("a", None)
    assert len(list(stream)) == 2
    assert list(stream) == []


def test_on_event_is_called_in_the_workers_thread(worker):
    seen, ended = [], threading.Event()

    def listen(event):
        seen.append((threading.current_thread().name, event))
        if isinstance(event, Done):
            ended.set()

    stream = worker.submit("ab", None, listen)
    assert ended.wait(10)
    assert {name for name, _ in seen} == {"lmfusion-engine"} and text_of(event for _, event in seen) == "ab"
    assert list(stream) == []


def test_what_the_engine_refuses_is_raised_where_it_was_submitted(worker):
    with pytest.raises(ValueError, match="too long; shorten it"):
        worker.submit("a!", None)
    assert text_of(worker.submit("ab", None)) == "ab"


def test_a_full_queue_is_busy_and_counts_it(engine, worker):
    streams = [worker.submit("....", None) for _ in range(engine.max_batch + worker.max_waiting)]
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        worker.submit("a", None)
    assert worker.stats().num_rejected == 1 and worker.stats().num_waiting == 3
    for stream in streams:
        stream.cancel()
    assert [list(stream)[-1].finish_reason for stream in streams] == ["cancelled"] * 7
    assert text_of(worker.submit("a", None)) == "a"


def test_the_bound_holds_for_threads_that_submit_at_once(engine, worker):
    engine.gate.clear()
    worker.submit("a", None)  # whose step now waits at the gate
    wait_until(lambda: worker.stats().num_running == 1)

    def submit(_):
        try:
            return worker.submit("b", None)
        except QueueFull:
            return None

    with ThreadPoolExecutor(12) as pool:
        results = pool.map(submit, range(12))
        wait_until(lambda: worker.stats().num_rejected == 12 - worker.max_waiting)
        engine.gate.set()
        accepted = [stream for stream in results if stream is not None]
    assert len(accepted) == worker.max_waiting
    assert all(text_of(stream) == "b" for stream in accepted)


@pytest.mark.parametrize("num_events", [0, 1, 2, 4])
def test_cancel_at_any_event_frees_the_request(engine, worker, num_events):
    stream = worker.submit("a##....", None)  # never ends by itself
    events = []
    for event in itertools.islice(stream, num_events):
        events.append(event)
    assert len(events) == num_events and engine.requests
    stream.cancel()
    wait_until(lambda: worker.stats().num_finished == {"cancelled": 1})
    assert engine.requests == {} and worker.stats().num_slots_used == 0
    stream.cancel()  # of an ended one: nothing
    assert text_of(worker.submit("ab", None)) == "ab"


def test_a_cancelled_answer_still_ends_with_done(worker):
    stream = worker.submit("a....", None)
    events = []
    for event in stream:
        events.append(event)
        stream.cancel()
    assert events == [TextDelta("a"), events[-1]] and events[-1].finish_reason == "cancelled"


def test_leaving_the_loop_cancels(engine, worker):
    for event in worker.submit("a......", None):
        assert event == TextDelta("a")
        break
    wait_until(lambda: worker.stats().num_finished == {"cancelled": 1})
    assert engine.requests == {} and worker.stats().num_slots_used == 0


def test_a_request_that_fails_hurts_no_other(worker):
    good, bad = worker.submit("a#bc", None), worker.submit("a?", None)
    assert list(bad)[-1].finish_reason == "error" and list(good)[-1].finish_reason == "stop"
    assert worker.stats().num_finished == {"error": 1, "stop": 1}


def test_a_step_that_fails_ends_what_ran_and_the_worker_goes_on(worker):
    done = list(worker.submit("ab*", None))[-1]
    assert done.finish_reason == "error" and "the device is gone" in done.error
    assert text_of(worker.submit("ab", None)) == "ab"
    assert worker.stats().problem == ""


def test_requests_that_wait_survive_a_step_that_fails():
    engine = FakeEngine(max_batch=1)
    worker = EngineWorker(engine)
    try:
        engine.gate.clear()
        first, second = worker.submit("a*", None), worker.submit("ab", None)
        engine.gate.set()
        assert list(first)[-1].finish_reason == "error" and text_of(second) == "ab"
    finally:
        worker.close()


def test_a_worker_whose_every_step_fails_gives_up_and_says_so(worker):
    for _ in range(MAX_FAILED_STEPS):
        assert list(worker.submit("*", None))[-1].finish_reason == "error"
    worker._thread.join(10)
    assert "the device is gone" in worker.stats().problem and worker.stats().num_running == 0
    with pytest.raises(Stopped, match=r"the device is gone.*start it again"):
        worker.submit("a", None)


def test_steps_that_succeed_in_between_are_no_reason_to_give_up(worker):
    for _ in range(MAX_FAILED_STEPS):
        assert list(worker.submit("a*", None))[-1].finish_reason == "error"
    assert text_of(worker.submit("ab", None)) == "ab"


def test_a_dead_thread_leaves_nobody_waiting(engine, worker, monkeypatch):
    def die():
        raise SystemExit

    stream = worker.submit("....", None)
    monkeypatch.setattr(engine, "step", die)
    done = list(stream)[-1]
    assert done.finish_reason == "error" and "SystemExit" in done.error
    with pytest.raises(Stopped):
        worker.submit("a", None)


def test_a_request_that_the_engine_loses_ends(worker):
    assert "without an answer" in list(worker.submit("a_", None))[-1].error


def test_a_listener_that_raises_has_its_own_request_cancelled(engine, worker):
    def fail(event):
        raise RuntimeError("loop is closed")

    worker.submit("a......", None, fail)
    assert text_of(worker.submit("abc", None)) == "abc"
    wait_until(lambda: worker.stats().num_finished == {"cancelled": 1, "stop": 1})
    assert engine.requests == {}


def test_submitting_from_a_listener_is_refused_not_a_deadlock(worker):
    errors = []

    def submit(event):
        if isinstance(event, Done):
            try:
                worker.submit("a", None)
            except RuntimeError as error:
                errors.append(str(error))

    worker.submit("a", None, submit)
    wait_until(lambda: errors)
    assert "on_event must not submit" in errors[0]


def test_close_cancels_everything_and_ends_the_thread(engine):
    worker = EngineWorker(engine)
    streams = [worker.submit("a.....", None) for _ in range(6)]
    worker.close()
    assert [list(stream)[-1].finish_reason for stream in streams] == ["cancelled"] * 6
    assert not worker._thread.is_alive() and engine.requests == {}
    with pytest.raises(Stopped, match="was closed"):
        worker.submit("a", None)
    worker.close()


def test_stats_add_up(worker):
    list(worker.submit("ab##", None))
    list(worker.submit("c", None))
    stats = worker.stats()
    assert (stats.num_prompt_tokens, stats.num_new_tokens, stats.num_images) == (5, 3, 2)
    assert stats.num_denoise_steps == 2 * NUM_STEPS and stats.num_finished == {"stop": 2}
    assert (stats.num_running, stats.num_waiting, stats.num_slots, stats.num_slots_used) == (0, 0, 100, 0)


def test_an_idle_worker_does_not_step(engine, worker):
    list(worker.submit("a", None))
    before = engine.num_steps
    time.sleep(0.05)
    assert engine.num_steps == before


def test_a_queue_without_places_is_refused(engine):
    with pytest.raises(ValueError, match="max_waiting must be at least 1, got 0"):
        EngineWorker(engine, max_waiting=0)
