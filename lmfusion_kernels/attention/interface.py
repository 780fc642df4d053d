"""What an attention kernel implements, and what it gets: `Kernel`, `AttentionProblem` and `AttentionCall`."""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lmfusion_kernels.layout.token_layout import TokenLayout

Queries = Literal["all", "active", "constant"]
"""Which tokens are queries: all tokens of the layout, the active ones (those with a backward), or the constant ones."""

Gradients = tuple[Tensor, Tensor, Tensor]
"""dq, dk, dv"""


class AttentionProblem(NamedTuple):
    """The properties of a call that decide whether a kernel can run it."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    needs_grad: bool
    is_cached: bool
    """Whether the keys are those of a key-value cache."""
    has_hidden: bool = False
    """Whether the layout has hidden spans."""


class AttentionCall(NamedTuple):
    """The arguments of one call of a kernel."""

    q: Tensor
    """[Nq, H, D]: the `queries`, in sequence order."""
    k: Tensor
    """[layout.num_keys, H_kv, D], in sequence order."""
    v: Tensor
    """As k."""
    layout: TokenLayout
    queries: Queries
    scale: float
    """Multiplies the scores."""

    def key_ranges(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """key_start and key_end by query, and the row of the result for each query (None: the same row)."""
        mask = self.layout.mask_of(self.queries)
        return mask.key_start, mask.key_end, mask.out_row

    def hidden_ends(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """visible_end by key, counted in `queries`, and run_end; None if the layout hides nothing."""
        layout = self.layout
        return (layout.mask_of(self.queries).visible_end, layout.hidden.run_end) if layout.has_hidden else (None, None)

    def query_ranges(self) -> tuple[Tensor, Tensor, Tensor]:
        """The keys that get gradients, and for each the range of `queries` that see it.

        Raises ValueError for constant tokens, which have no backward.
        """
        mask = self.layout.mask_of(self.queries)
        if mask.key is None or mask.query_start is None or mask.query_end is None:
            raise ValueError(NO_BACKWARD_OF_CONSTANT_TOKENS)
        return mask.key, mask.query_start, mask.query_end

    def aligned(self) -> "AttentionCall":
        """The same call with q, k and v as `aligned` returns them."""
        return self._replace(q=aligned(self.q), k=aligned(self.k), v=aligned(self.v))


NO_BACKWARD_OF_CONSTANT_TOKENS = "constant tokens have no backward: nothing trainable reaches them"


class Kernel(Protocol):
    """One implementation of hybrid attention.

    out: [Nq, H, D] in sequence order, except that "active" rows are in [live | image] order. lse: float32 [H, Nq] by
    query, the log of the sum of exp(score).
    """

    @property
    def summary(self) -> str:
        """What it is, in one line of `backends()`."""
        ...

    @property
    def is_differentiable(self) -> bool:
        """Whether autograd follows `forward`; otherwise a caller has to use `backward`."""
        ...

    def unavailable_reason(self, device: torch.device) -> str:
        """Why it cannot run on `device` whatever the tensors, as the rest of a sentence; empty if it can."""
        ...

    def unsupported_reason(self, problem: AttentionProblem) -> str:
        """Why a kernel that is available cannot run `problem`, as the rest of a sentence; empty if it can."""
        ...

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """out and lse."""
        ...

    def backward(self, call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """dq, dk, dv from what `forward` returned; dk, dv of the keys of `queries`. "constant" has no backward."""
        ...


def ranges_by_key(
    key_start: Tensor, key_end: Tensor, num_keys: int, visible_end: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The queries `[query_start[j], query_end[j])` that see key `j`: int32 [num_keys].

    Computed from the keys that each query sees, and from visible_end by key if some keys are hidden.
    """
    key = torch.arange(num_keys, dtype=torch.int32, device=key_start.device)
    query_start = torch.searchsorted(key_end, key, right=True, out_int32=True)
    query_end = torch.searchsorted(key_start, key, right=True, out_int32=True)
    if visible_end is not None:
        query_end = torch.minimum(query_end, visible_end[:num_keys])
    return query_start, torch.maximum(query_start, query_end)  # an empty range for a key that no query sees


def aligned(x: Tensor) -> Tensor:
    """`x` [n, H, D], copied unless every row of every head is contiguous and begins at a multiple of 8 elements."""
    fits = x.stride(-1) == 1 and all(step % 8 == 0 for step in x.stride()[:-1])
    if fits and not torch.compiler.is_compiling():  # a traced tensor cannot be asked for its offset
        fits = x.storage_offset() % 8 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
