"""The cases that are emulated: attention forward, backward and decode, and the gate-up projection, with exact results.

    python -m tests.kernels.ptx_emulation.cases '[{"case": "attention", "capability": 90, ...}]'

prints one JSON list of outcomes. A process of its own, because the process that runs the tests may have imported triton
for its interpreter, or another version of triton.
"""

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

os.environ["LMFUSION_KERNELS_BACKEND"] = "reference"

import torch
import triton

import lmfusion_kernels as lk
from tests.kernels.ptx_emulation.block import Schedule
from tests.kernels.ptx_emulation.launcher import Emulation, emulate
from tests.kernels.ptx_emulation.values import EmulationError

Spans = list[list[tuple[Any, ...]]]

DOCUMENTS: dict[str, Spans] = {
    # Tiles of 128 tokens cross documents, and images cross tiles.
    "mixed": [[("text", 40), ("image", 150), ("text", 13)], [("text", 30), ("image", 40), ("text", 7)]],
    "small": [[("text", 70), ("image", 61)]],
    "hidden": [
        [("text", 20), ("image", 70, "hidden"), ("image", 70), ("text", 9)],
        [("text", 5), ("image", 33), ("text", 3)],
    ],
}


LARGEST_ERROR = 3
"""Over that of the reference in the same dtype. Kernels round the weights of the softmax and their gradients to the
dtype before the next product, which the reference does not; 2.2 is the largest that occurs, in float16."""


@dataclass
class Outcome:
    """What became of a case."""

    fault: str = ""
    """What the emulator refused."""
    errors: dict[str, float] = field(default_factory=dict)
    """Of each result: its largest error over that of the reference in the same dtype; infinite if there is a NaN."""
    launched: list[str] = field(default_factory=list)
    num_steps: int = 0
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        return not self.fault and max(self.errors.values()) <= LARGEST_ERROR


def attention(
    dtype: torch.dtype,
    head_dim: int,
    documents: str = "mixed",
    backward: bool = False,
    num_constant: int = 0,
    num_queries: int | None = None,
) -> Callable[[], dict[str, tuple[torch.Tensor, ...]]]:
    """Two query heads on one key-value head: (result, exact, reference in dtype) by name.

    Results are written in tower order. num_constant: tokens at the beginning whose keys and values get no gradient.
    num_queries: the last tokens alone are queries, as in generation.
    """
    from lmfusion_kernels.triton import hybrid_attention

    layout = lk.TokenLayout.from_spans(DOCUMENTS[documents])
    n, scale = layout.num_tokens, head_dim**-0.5
    generator = torch.Generator().manual_seed(head_dim)
    q, dout = (torch.randn(n, 2, head_dim, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(n, 1, head_dim, generator=generator).to(dtype) for _ in range(2))
    exact, rough = (by_reference(q, k, v, dout, layout, scale, kind) for kind in (torch.float64, dtype))
    of_query = slice(n - (num_queries or n), n)
    out_row = layout.sequence_to_tower if num_queries is None else None
    ranges = layout.key_start[of_query].contiguous(), layout.key_end[of_query].contiguous()
    grad_key = torch.arange(num_constant, n, dtype=torch.int32)
    by_key = grad_key, layout.mask.query_start[num_constant:].clone(), layout.mask.query_end[num_constant:].clone()
    hidden = (layout.mask.visible_end, layout.hidden.run_end) if layout.has_hidden else (None, None)

    def in_sequence(x: torch.Tensor) -> torch.Tensor:
        return x if out_row is None else x[out_row.long()]

    def run() -> dict[str, tuple[torch.Tensor, ...]]:
        out, lse = hybrid_attention.forward(q[of_query], k, v, *ranges, out_row, scale, *hidden)
        found = {"out": (in_sequence(out), exact["out"][of_query], rough["out"][of_query])}
        if backward:
            dout_in_tower_order = dout.clone()
            dout_in_tower_order[layout.sequence_to_tower.long()] = dout
            grads = hybrid_attention.backward(
                dout_in_tower_order, q, k, v, out, lse, *ranges, *by_key, out_row, scale, *hidden
            )
            for name, grad, keys in zip(("dq", "dk", "dv"), grads, (0, num_constant, num_constant), strict=True):
                found[name] = (grad, exact[name][keys:], rough[name][keys:])
        return found

    return run


def by_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, layout: lk.TokenLayout, scale: float,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:  # fmt: skip
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = lk.reference.hybrid_attention(*inputs, layout, scale)
    out.backward(dout.to(dtype))
    return {"out": out.detach(), **{name: x.grad for name, x in zip(("dq", "dk", "dv"), inputs, strict=True)}}


def gate_up_swiglu(dtype: torch.dtype, keep: bool = True) -> Callable[[], dict[str, tuple[torch.Tensor, ...]]]:
    """Both towers with ragged numbers of rows, and constant rows of which gate and up are not kept."""
    from lmfusion_kernels.triton import gate_up_swiglu as kernel

    generator = torch.Generator().manual_seed(0)
    width, intermediate, num_constant = 192, 256, 37
    x = [torch.randn(rows, width, generator=generator).to(dtype) for rows in (200, 130)]
    weights = [(torch.randn(2 * intermediate, width, generator=generator) * width**-0.5).to(dtype) for _ in x]

    def run() -> dict[str, tuple[torch.Tensor, ...]]:
        hidden, gate_up = kernel.forward(x, weights, num_constant=num_constant, keep=keep)
        found = {}
        for name, part, weight, skipped, result, kept in zip(
            ("text", "image"), x, weights, (num_constant, 0), hidden, gate_up or (None, None), strict=True
        ):
            exact, rough = ((part.to(kind) @ weight.to(kind).T) for kind in (torch.float64, dtype))
            found[f"{name} hidden"] = (result, lk.reference.swiglu(exact), lk.reference.swiglu(rough))
            if kept is not None:
                found[f"{name} gate_up"] = (kept, exact[skipped:], rough[skipped:])
        return found

    return run


CASES: dict[str, Any] = {"attention": attention, "gate_up_swiglu": gate_up_swiglu}


def run_case(
    case: str, capability: int, dtype: str, arguments: dict[str, Any], schedule: dict[str, Any] | None = None,
    removed: tuple[str, int] | None = None, kernel: str = "",
) -> Outcome:  # fmt: skip
    """One case. removed: a pattern, and which of the instructions that match it is taken out of `kernel`."""
    run = CASES[case](dtype=getattr(torch, dtype), **arguments)
    emulation = Emulation(schedule=Schedule(**(schedule or {})))
    if removed is not None:
        emulation.change = remove(kernel, *removed)
    outcome = Outcome(launched=emulation.launched)
    began = time.perf_counter()
    try:
        with emulate(capability, emulation):
            results = run()
        outcome.errors = {name: relative_error(*tensors) for name, tensors in results.items()}
    except EmulationError as error:
        outcome.fault = str(error)
    outcome.num_steps, outcome.seconds = emulation.num_steps, time.perf_counter() - began
    return outcome


def relative_error(found: torch.Tensor, exact: torch.Tensor, rough: torch.Tensor) -> float:
    error, own = ((x.double() - exact.double()).abs().max().item() for x in (found, rough))
    return error / own if error == error else float("inf")


def remove(kernel: str, pattern: str, number: int) -> Callable[[str, str], str]:
    """A change of PTX for `Emulation.change`. A wait for an mbarrier becomes one that is always over."""

    def change(name: str, ptx: str) -> str:
        found = list(re.finditer(pattern, ptx)) if name == kernel else []
        if number >= len(found):
            return ptx
        instruction = found[number][0]
        waits = re.match(r"mbarrier\.try_wait\S*\s+(\S+),", instruction)
        put = f"setp.eq.s32 {waits[1]}, 0, 0;" if waits else ""
        return ptx[: found[number].start()] + put + ptx[found[number].end() :]

    return change


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.use_deterministic_algorithms(True)  # and so new tensors hold NaN
    torch.set_num_threads(1)
    outcomes = [run_case(**case) for case in json.loads(sys.argv[1])]
    print(json.dumps([triton.__version__, [asdict(outcome) | {"is_right": outcome.is_right} for outcome in outcomes]]))


if __name__ == "__main__":
    main()
