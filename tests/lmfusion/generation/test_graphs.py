"""Replayed steps give the results of the steps. A tracer stands in for CUDA graphs.

Like a graph, it keeps every op and every number that was on the host, and knows tensors only by their memory.
"""

import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from lmfusion.generation.device_steps import decode_step
from lmfusion.generation.graphs import ReplayedStep, recorder_for
from tests.lmfusion.generation.replays import LIMIT, STEPS, assert_replayed, decode_calls, make_model

CPU = torch.device("cpu")


class Tracer:
    """A recorder whose graph is that of torch.fx: the ops below autograd, with their arguments."""

    def warm_up(self, run):
        return run()

    def record(self, run):
        return make_fx(run)()


class Refusing(Tracer):
    def record(self, run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore about it")


@pytest.fixture(scope="module")
def model(tiny_llama):
    return make_model(tiny_llama)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", STEPS)
def test_documents_of_other_lengths_at_other_places(model, name):
    """One graph serves all of them, and holds the cache that it writes into."""
    step, make_calls = STEPS[name]
    assert_replayed(model, Tracer(), step, make_calls())


def test_a_document_that_outgrows_its_bound_is_recorded_again(model):
    """Bounds are powers of two, up to the most tokens of a document."""
    calls = decode_calls([([length], [0], 0) for length in (31, 16, 32, 63, 100, 140)])
    assert_replayed(model, Tracer(), decode_step, calls, num_graphs=4)
    layouts = [call.arguments[1] for call in calls]
    assert [layout.bounded(LIMIT).longest_document for layout in layouts] == [32, 32, 64, 64, 128, 256]
    assert [layout.bounded(150).longest_document for layout in layouts] == [32, 32, 64, 64, 128, 150]
    assert layouts[-1].bounded(140).longest_document == 141  # a bound at any rate


def test_other_shapes_and_constants_are_recorded_apart():
    def step(x, pair, factor, flag):
        return x * factor + sum(pair[0]) + (1 if flag is True else 0)

    replayed = ReplayedStep(step, CPU, Tracer())
    x, y = torch.arange(2.0), torch.arange(3.0)
    pair = ([x, x], None)
    first = [
        (x, pair, 2, True),
        (y, ([y, y], None), 2, True),
        (x, pair, 3, True),
        (x, pair, 2, 1),
        (x, pair, 2.0, True),
    ]
    for arguments in first:
        assert torch.equal(replayed(*arguments), step(*arguments))
    assert replayed.num_recorded == replayed.num_graphs == len(first)
    for arguments in first:
        assert torch.equal(replayed(*arguments), step(*arguments))
    assert (replayed.num_recorded, replayed.num_replayed) == (len(first), len(first))


def test_the_graph_that_was_used_longest_ago_is_dropped():
    replayed = ReplayedStep(torch.neg, CPU, Tracer(), max_graphs=2)
    for size, num_recorded in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        assert torch.equal(replayed(torch.ones(size)), -torch.ones(size))
        assert (replayed.num_recorded, replayed.num_graphs) == (num_recorded, min(num_recorded, 2))
    replayed.clear()
    assert replayed.num_graphs == 0
    replayed(torch.ones(1))
    assert replayed.num_recorded == 5


def test_numbers_of_the_host_would_be_noticed():
    """The tracer behaves like a CUDA graph: numbers of the host are frozen, and those of a tensor cannot be read."""
    numbers = iter(range(9))
    replayed = ReplayedStep(lambda x: x + next(numbers), CPU, Tracer())
    assert [replayed(torch.zeros(1)).item() for _ in range(4)] == [0, 1, 1, 1]
    with pytest.warns(UserWarning, match="recording one failed .*_local_scalar_dense"):
        ReplayedStep(lambda x: x + int(x.sum()), CPU, Tracer())(torch.ones(2))


def test_without_a_recorder_the_function_is_called():
    calls = []
    replayed = ReplayedStep(lambda x: calls.append(x) or -x, CPU, None)
    assert replayed(torch.ones(1)) == replayed(torch.ones(1)) == -1
    assert (len(calls), replayed.num_recorded, replayed.num_replayed, replayed.num_graphs) == (2, 0, 0, 0)


def test_what_cannot_be_recorded_is_run_and_said_once():
    replayed = ReplayedStep(torch.neg, CPU, Refusing())
    with pytest.warns(UserWarning, match=r"without CUDA graphs.*\(operation not permitted when stream is capturing\)$"):
        assert replayed(torch.ones(1)) == -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replayed(torch.ones(1)) == -1
    with pytest.raises(RuntimeError, match="too large"):  # the step's own errors are its caller's
        ReplayedStep(lambda x: (_ for _ in ()).throw(RuntimeError("too large")), CPU, Tracer())(torch.ones(1))


def test_graphs_need_a_gpu():
    assert recorder_for(CPU, None) is None and recorder_for(CPU, False) is None
    with pytest.raises(
        ValueError, match="use_graphs must be False or None without a GPU, got True with a model on cpu"
    ):
        recorder_for(CPU, True)
