"""CUDA graphs: a step is captured once for every shape of its arguments, and then replayed with one launch.

A graph holds kernels and the addresses that they read and write. So the arguments of a step are copied to static
buffers that the graph reads, and its results are copied away before the next replay overwrites them. The keys and
values of the cache, which the step writes in place, stay where they are. What is not in a tensor is part of the graph
and therefore of its key: sizes, constants and the counts of a layout.
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
    """Turns a function without arguments into one that runs the same kernels on the same memory again."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """run(), outside of a recording, with whatever happens only in a first call: compilation, allocation."""
        ...

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A function that returns what `run` returned; its next call may overwrite that.

        Raises RuntimeError if `run` does something that cannot be recorded.
        """
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory for intermediate results. Untested on a GPU."""

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
        # The result was allocated on the recorder's stream, but is used on the current one: without this the allocator
        # could give its memory away too early
        for tensor in _leaves(result):
            tensor.record_stream(current)
        return result

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may use the device meanwhile
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        # A failed capture does not restore the current stream, so the outer context does
        with torch.cuda.stream(torch.cuda.current_stream(self._device)), capture:
            result = run()

        def replay() -> Any:
            graph.replay()
            return result

        return replay


def recorder_for(device: torch.device, use_graphs: bool | None) -> Recorder | None:
    """The recorder that the steps of one engine share; None if they are launched from the host.

    use_graphs: None means yes on a GPU. Raises ValueError for True elsewhere.
    """
    if device.type == "cuda":
        return None if use_graphs is False else CudaRecorder(device)
    if use_graphs:
        raise ValueError(f"use_graphs must be False or None without a GPU, got True with a model on {device.type}")
    return None


class ReplayedStep:
    """`function`, recorded once for every shape of its arguments and replayed when the shape comes again.

    Arguments are tensors, layouts, (named) tuples and lists of tensors and layouts, and hashable constants, which like
    shapes select the recording. Results are tensors, and tuples or lists of tensors; they belong to the caller. Tensors
    and layouts may be on the host. The function may write into tensors that it holds, such as a cache. It must not wait
    for the device, and must not depend on what it wrote there before, since the first call may run it twice. The
    tensors that it holds must stay at their addresses: call `clear` after moving them.
    """

    num_recorded: int
    """Graphs made so far."""
    num_replayed: int
    """Calls that replayed one of them."""

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        recorder: Recorder | None,
        *,
        max_graphs: int = 128,
        longest_document: int | None = None,
    ) -> None:
        """device: where the function computes. recorder: None to call the function every time. max_graphs: beyond this
        the least recently used graph is dropped. longest_document: the most tokens a document can have; layouts are
        recorded for the next power of two, at most for this.
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
        """Drop all graphs. To be called when tensors that the function holds have moved."""
        self._recordings.clear()

    def __call__(self, *arguments: Any) -> Any:
        if self._recorder is None:
            return self._function(*_map(self._to_device, arguments))
        arguments = _map(self._bounded, arguments)
        key = _key(arguments)
        recording = self._recordings.get(key)
        if recording is None:
            return self._record(key, arguments)
        self._recordings.move_to_end(key)
        self.num_replayed += 1
        for buffer, argument in zip(recording.buffers, _leaves(arguments), strict=True):
            buffer.load(argument)
        # Cloned, because the next replay writes its results to the same memory
        return _map(torch.clone, recording.replay())

    def _record(self, key: Hashable, arguments: tuple[Any, ...]) -> Any:
        """The result of the first call for a shape; its graph is kept for the next ones."""
        assert self._recorder is not None
        buffers = [_buffer_like(argument, self._device) for argument in _leaves(arguments)]
        remaining = iter(buffers)
        static = _map(lambda _: next(remaining).value, arguments)
        # The result comes from the warm-up: recording runs no kernel, and its memory is overwritten by the next replay
        result = self._recorder.warm_up(lambda: self._function(*static))
        try:
            replay = self._recorder.record(lambda: self._function(*static))
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

    def _bounded(self, argument: "Tensor | TokenLayout") -> "Tensor | TokenLayout":
        return argument.bounded(self._longest_document) if isinstance(argument, TokenLayout) else argument

    def _to_device(self, argument: "Tensor | TokenLayout") -> "Tensor | TokenLayout":
        return argument.to(self._device) if isinstance(argument, TokenLayout) else upload(argument, self._device)


class _TensorBuffer:
    """The static buffer from which a graph reads a tensor."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        self.load(tensor)

    def load(self, tensor: Tensor) -> None:
        self.value.copy_(_pinned(tensor, self.value.device), non_blocking=True)


class _LayoutBuffer:
    """The static buffer from which a graph reads the vectors of a layout: one buffer, so one copy from the host."""

    def __init__(self, layout: TokenLayout, device: torch.device) -> None:
        self._buffer = torch.empty(pack(layout.vectors).shape, dtype=torch.int32, device=device)
        self.value = layout.with_vectors(unpack(self._buffer, layout.vectors))
        self._loaded: Tensor | None = None
        self.load(layout)

    def load(self, layout: TokenLayout) -> None:
        if layout.position is self._loaded:  # the layout of the step before, as in most steps of an image
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
    """`tensor`, in page-locked memory if it is on the host and `device` is a GPU, so that copying it does not wait."""
    return tensor.pin_memory() if tensor.device.type == "cpu" and device.type == "cuda" else tensor


def _is_parent(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with the function applied to every tensor and layout in it."""
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
    """What a graph for `value` depends on besides the numbers in its tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, TokenLayout):
        return value.counts, tuple(vector.shape for vector in value.vectors.values())
    if _is_parent(value):
        return type(value), tuple(_key(child) for child in value)
    return type(value), value
