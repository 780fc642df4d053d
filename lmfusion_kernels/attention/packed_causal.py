"""Causal attention of packed sequences, as FlashAttention computes it: interface, and adapter for its packages."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lmfusion_kernels.attention.availability import unsupported_by_flash
from lmfusion_kernels.attention.interface import AttentionProblem, Gradients


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where packed sequences lie: sequence b has the queries [query_start[b], query_start[b + 1]) of q [total_q, H, D],
    and its keys begin at row key_start[b] of k, v [total_k, H_kv, D]. All vectors are int32, on the device."""

    query_start: Tensor
    key_start: Tensor
    max_queries: int
    """No sequence has more."""
    max_keys: int
    num_keys: Tensor | None = None
    """Keys of each sequence; None: all keys up to the start of the next sequence."""

    def by_name(self) -> dict[str, Any]:
        """The bounds under the names that the flash-attn packages give them."""
        return {
            "cu_seqlens_q": self.query_start,
            "cu_seqlens_k": self.key_start,
            "max_seqlen_q": self.max_queries,
            "max_seqlen_k": self.max_keys,
        }


class PackedCausal(Protocol):
    """Causal attention of packed sequences.

    The last query of a sequence sees its last key: of n queries and m keys, query i sees the first m - n + i + 1 keys.
    """

    @property
    def summary(self) -> str: ...

    def unavailable_reason(self, device: torch.device) -> str: ...

    def unsupported_reason(self, problem: AttentionProblem) -> str: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        """out [total_q, H, D] and lse [H, total_q], the log of the sum of exp(score)."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Sequences,
        scale: float,
    ) -> Gradients:
        """dq, dk, dv. Their rows for keys that no query sees hold anything and must not be read."""
        ...


class FlashAttentionPackage:
    """An installed FlashAttention as `PackedCausal`. A subclass says when it is available and makes the two calls.

    The packages take the same tensors under the same names, and write gradients into tensors they are given.
    """

    def unsupported_reason(self, problem: AttentionProblem) -> str:
        return unsupported_by_flash(problem)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.call_forward(
            {"q": q, "k": k, "v": v, "softmax_scale": scale, "causal": True, "seqused_k": sequences.num_keys},
            sequences,
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Sequences,
        scale: float,
    ) -> Gradients:
        # Contiguous: given other tensors, flash-attn would fill copies that it does not return.
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv}
        self.call_backward({**tensors, **sequences.by_name(), "softmax_scale": scale})
        return dq, dk, dv

    @abstractmethod
    def call_forward(self, arguments: dict[str, Any], sequences: Sequences) -> tuple[Tensor, ...]:
        """Call the package with `arguments` and the bounds of `sequences`: out, lse, and whatever else it returns."""

    @abstractmethod
    def call_backward(self, arguments: dict[str, Any]) -> None:
        """Call the package's backward, which fills dq, dk and dv of `arguments`."""


def at_least_two(sequences: Sequences, q: Tensor) -> int:
    """The bound on queries for FlashAttention-2, which takes 1 to mean that every sequence has exactly one query.

    It then reads q as [number of sequences, ...], but here some may have none. The bound is only a bound.
    """
    is_exact = q.shape[0] == sequences.query_start.shape[0] - 1
    return 2 if sequences.max_queries == 1 and not is_exact else sequences.max_queries
