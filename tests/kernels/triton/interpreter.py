"""Runs Triton kernels on the CPU, in Triton's interpreter, in a separate process.

Whether kernels are interpreted is fixed when triton is first imported, because its own functions (tl.max, ...) are
decorated then. A test process cannot have both, and the compile tests need the compiler, so calls go to
one worker process with TRITON_INTERPRET=1. It is started at the first call and ends with the test process.

The interpreter is silently wrong about bfloat16: float16 and float32 only.
"""

import atexit
import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch


def call(module: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """`module.name(*args, **kwargs)` in the interpreter. Tensors are passed by value; errors are raised here."""
    assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args), "bfloat16 is not right"
    return _unpack(_worker().submit(_call_in_worker, module, name, _pack(args), _pack(kwargs)).result())


@cache
def _worker() -> ProcessPoolExecutor:
    worker = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _set_up)
    atexit.register(worker.shutdown)
    # The worker process, started by the first task, inherits these. More threads do not help its small products.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"):
        worker.submit(os.getpid).result()
    return worker


def _set_up() -> None:
    """Set up the worker: torch.empty is filled with NaN, and tensors as loop bounds work with numpy >= 2.4."""
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    np.seterr(invalid="ignore", over="ignore")  # -inf - x and the like, which a GPU does not report
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index

    def fused_multiply_add(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = (np.asarray(operand.data, np.float64) for operand in (x, y, z))
        product, addend = next(wide) * next(wide), next(wide)
        return interpreter.TensorHandle((product + addend).astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fused_multiply_add  # its own version rounds the product first


def _call_in_worker(module: str, name: str, args: Any, kwargs: Any) -> Any:
    return _pack(getattr(importlib.import_module(module), name)(*_unpack(args), **_unpack(kwargs)))


def _pack(value: Any) -> Any:
    """Tensors as numpy arrays of their memory: torch would use shared memory and file handles."""
    if isinstance(value, torch.Tensor):
        size = value.untyped_storage().nbytes() // value.element_size()
        memory = value.detach().as_strided((size,), (1,), 0).numpy()
        return _Packed(memory, tuple(value.shape), value.stride(), value.storage_offset())
    if isinstance(value, list | tuple):
        return tuple(_pack(x) for x in value)
    if isinstance(value, dict):
        return {name: _pack(x) for name, x in value.items()}
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, _Packed):
        return torch.from_numpy(value.memory.copy()).as_strided(value.shape, value.stride, value.offset)
    if isinstance(value, tuple):
        return tuple(_unpack(x) for x in value)
    if isinstance(value, dict):
        return {name: _unpack(x) for name, x in value.items()}
    return value


@dataclass
class _Packed:
    memory: np.ndarray
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
