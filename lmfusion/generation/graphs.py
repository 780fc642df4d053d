"""How does a step that repeats cost one launch? Captured as a CUDA graph once for every shape, and then replayed.

A graph holds kernels and the addresses they read and write. So what a step is given is copied to where the graph reads
it, and what comes out is copied away; keys and values of the cache, which the step writes in place, stay where they
are. Everything that is not in a tensor is part of the graph: sizes, and the counts of a layout. They are its key.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lmfusion.generation.async_copy import upload
from lmfusion_kernels.layout.buffer import pack, unpack
from lmfusion_kernels.layout.token_layout import TokenLayout


class Recorder(Protocol):
    """What turns a function without arguments into one that runs the same kernels on the same memory again."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """run(), where everything that happens the first time alone may happen."""
        ...

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A function that answers as `run` did; its next call may overwrite what it gave. Raises RuntimeError where
        `run` does what cannot be recorded."""
        ...


class CudaRecorder:
    """CUDA graphs that share the memory of what they compute on the way. Untested on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = run()
        current.wait_stream(self._stream)
        for tensor in _leaves(result):
            tensor.record_stream(current)
        return result

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device meanwhile
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(torch.cuda.current_stream(self._device)), capture:  # which a failed one does not restore
            result = run()

        def replay() -> Any:
            graph.replay()
            return result

        return replay


def recorder_for(device: torch.device, use_graphs: bool | None) -> Recorder | None:
    """The recorder that the steps of one engine share; None where they are to run as they are.

    use_graphs: None is yes on a GPU. Raises ValueError for True elsewhere.
    """
    if device.type == "cuda":
        return None if use_graphs is False else CudaRecorder(device)
    if use_graphs:
        raise ValueError(f"use_graphs is True, but the model is on {device.type}; CUDA graphs need a GPU")
    return None


class ReplayedStep:
    """`function`, recorded once for every shape of its arguments and replayed whenever a shape comes again.

    Arguments are tensors, layouts, (named) tuples and lists of those, and hashable constants, which like shapes decide
    what is recorded; results are tensors and tuples or lists of those. Tensors and layouts may be on the host. A result
    is the caller's own. The function may write into tensors that it holds, as into a cache; it must neither wait for
    the device nor depend on what it wrote there before, since the first call may run it twice. What it holds stays
    where it is: after moving it, `clear`.
    """

    num_recorded: int
    """Graphs made so far."""
    num_replayed: int
    """Calls answered by one of them."""

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        recorder: Recorder | None,
        *,
        max_graphs: int = 128,
        longest_document: int | None = None,
    ) -> None:
        """device: where the function computes. recorder: None to call it every time. max_graphs: when there are more,
        the one that was used longest ago is dropped. longest_document: tokens that no document exceeds; layouts are
        recorded for the next power of two, or for this.
        """
        self._function = function
        self._device = device
        self._recorder = recorder
        self._max_graphs = max_graphs
        self._longest_document = longest_document
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self.num_recorded = self.num_replayed = 0

    @property
    def num_graphs(self) -> int:
        """Graphs that are held now."""
        return len(self._recordings)

    def clear(self) -> None:
        """Drop all graphs, as is due when the function's own tensors have moved."""
        self._recordings.clear()

    def __call__(self, *arguments: Any) -> Any:
        if self._recorder is None:
            return self._function(*_map(self._place, arguments))
        arguments = _map(self._bound, arguments)
        key = _key(arguments)
        recording = self._recordings.get(key)
        if recording is None:
            return self._record(key, arguments)
        self._recordings.move_to_end(key)
        self.num_replayed += 1
        for buffer, argument in zip(recording.buffers, _leaves(arguments), strict=True):
            buffer.load(argument)
        return _map(torch.clone, recording.replay())

    def _record(self, key: Hashable, arguments: tuple[Any, ...]) -> Any:
        """The answer to a first call, whose graph is kept."""
        assert self._recorder is not None
        buffers = [_buffer_like(argument, self._device) for argument in _leaves(arguments)]
        places = iter(buffers)
        placed = _map(lambda _: next(places).value, arguments)
        result = self._recorder.warm_up(lambda: self._function(*placed))
        try:
            replay = self._recorder.record(lambda: self._function(*placed))
        except RuntimeError as error:
            self._recorder = None
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"steps run without CUDA graphs, which is slower: recording one failed ({reason})", stacklevel=3
            )
            return result
        self._recordings[key] = _Recording(buffers, replay)
        self.num_recorded += 1
        if len(self._recordings) > self._max_graphs:
            self._recordings.popitem(last=False)
        return result

    def _bound(self, argument: "Tensor | TokenLayout") -> "Tensor | TokenLayout":
        return argument.bounded(self._longest_document) if isinstance(argument, TokenLayout) else argument

    def _place(self, argument: "Tensor | TokenLayout") -> "Tensor | TokenLayout":
        return argument.to(self._device) if isinstance(argument, TokenLayout) else upload(argument, self._device)


class _TensorBuffer:
    """Where a graph reads a tensor."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        self.load(tensor)

    def load(self, tensor: Tensor) -> None:
        self.value.copy_(_pinned(tensor, self.value.device), non_blocking=True)


class _LayoutBuffer:
    """Where a graph reads the vectors of a layout: one buffer, so that one copy brings them from the host."""

    def __init__(self, layout: TokenLayout, device: torch.device) -> None:
        self._buffer = torch.empty(pack(layout.vectors).shape, dtype=torch.int32, device=device)
        self.value = layout.with_vectors(unpack(self._buffer, layout.vectors))
        self._loaded: Tensor | None = None
        self.load(layout)

    def load(self, layout: TokenLayout) -> None:
        if layout.position is self._loaded:  # the same layout as before, as in most steps of an image
            return
        self._loaded, source = layout.position, layout.vectors
        if layout.device == self._buffer.device:
            torch._foreach_copy_(list(self.value.vectors.values()), list(source.values()))
        else:
            packed = pack(source, pin_memory=self._buffer.device.type == "cuda")
            self._buffer.copy_(packed, non_blocking=True)


@dataclass(frozen=True)
class _Recording:
    buffers: "list[_TensorBuffer | _LayoutBuffer]"
    replay: Callable[[], Any]


def _buffer_like(argument: Any, device: torch.device) -> "_TensorBuffer | _LayoutBuffer":
    return (_LayoutBuffer if isinstance(argument, TokenLayout) else _TensorBuffer)(argument, device)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, in page-locked memory where it is on the host and `device` is a GPU: copying it waits for nothing."""
    return tensor.pin_memory() if tensor.device.type == "cpu" and device.type == "cuda" else tensor


def _is_parent(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with the function's answer in the place of every tensor and layout in it."""
    if isinstance(value, (Tensor, TokenLayout)):
        return function(value)
    if not _is_parent(value):
        return value
    children = [_map(function, child) for child in value]
    return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors and layouts in `value`."""
    if isinstance(value, (Tensor, TokenLayout)):
        yield value
    elif _is_parent(value):
        for child in value:
            yield from _leaves(child)


def _key(value: Any) -> Hashable:
    """What a graph for `value` is tied to."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, TokenLayout):
        return value.counts, tuple(vector.shape for vector in value.vectors.values())
    if _is_parent(value):
        return type(value), tuple(_key(child) for child in value)
    return type(value), value
