"""AdamW over the trained weights, its learning-rate schedule, and the choice of weights that decay.

Each rank updates only the rows (of dimension 0) that it holds of each weight.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmfusion.training.checkpoint import Slice, restore
from lmfusion.training.config import OptimizerConfig
from lmfusion.training.distributed import World, local_range, local_shard

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a weight, by torch's names; "step" is the third."""
MAX_BLOCK, MIN_BLOCK, MIN_QUANTIZED = 256, 64, 4096
"""Numbers per block of 8-bit state at most and at least, and per weight that gets 8-bit state at least."""


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Learning rate of step number `step` (from 0): a linear warm-up, then a cosine that ends at the minimum."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


class Optimizer:
    """AdamW over named weights.

    kind: "adamw" (moments in float32) or "adamw_8bit" (moments in blocks of 8-bit codes, by torchao). text_ratio: the
    learning rate of weights named `text.` divided by that of the others.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: OptimizerConfig,
        kind: str = "adamw",
        text_ratio: float = 1.0,
    ) -> None:
        """weights: float32, on their final device, sharded by FSDP2 or not. Raises ValueError if there are none."""
        if not weights:
            raise ValueError("the model has no weights to train")
        self.config = config
        self.weights = weights
        self._text_ratio = text_ratio
        # Plain tensors that share the weights' memory, so that no DTensor reaches the optimizer
        held = {name: local_shard(weight.detach()) for name, weight in weights.items()}
        self._local = {name: rows for name, rows in held.items() if rows.numel()}
        self._is_8bit = kind == "adamw_8bit"
        # torchao compiles its update once for each shape, so it gets only the weights that save memory by it
        coded = {name: rows for name, rows in self._local.items() if self._block(name)}
        plain = {name: rows for name, rows in self._local.items() if name not in coded}
        options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
        self._optimizers: list[torch.optim.Optimizer] = []
        if plain:
            fused = all(rows.device.type in ("cpu", "cuda") for rows in plain.values())
            self._optimizers.append(torch.optim.AdamW(self._groups(plain), fused=fused, **options))
        if self._is_8bit:
            adamw_8bit = _torchao().AdamW8bit  # fails if torchao is missing, even if no weight here is 8-bit
            if coded:
                self._optimizers.append(adamw_8bit(self._groups(coded), **options))
        self._state: dict[str, dict[str, Any]] = {}
        for name, rows in self._local.items():  # allocate now: too little memory shows before the first step
            block = self._block(name)
            self._state[name] = {
                "step": torch.zeros((), device="cpu" if block else rows.device),
                "exp_avg": _zeros(rows, block, signed=True),
                "exp_avg_sq": _zeros(rows, block, signed=False),
            }
            self._optimizers[-1 if block else 0].state[rows] = self._state[name]

    def _groups(self, weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        kinds = {name: (name.startswith("text."), has_decay(name, rows)) for name, rows in weights.items()}
        return [
            {
                "params": [rows for name, rows in weights.items() if kinds[name] == (is_text, decays)],
                "weight_decay": self.config.weight_decay if decays else 0.0,
                "ratio": self._text_ratio if is_text else 1.0,
            }
            for is_text, decays in sorted(set(kinds.values()))
        ]

    @property
    def can_skip(self) -> bool:
        """Whether `step` takes `skip`. If not, the host must check that the gradients are finite before each step."""
        return not self._is_8bit

    def step(self, step: int, skip: Tensor | None = None) -> float:
        """Update the weights from their gradients and drop the gradients; returns the learning rate of `step`.

        skip: float32 [] on the weights' device; if it is 1, nothing changes. The host does not read it.
        """
        assert skip is None or self.can_skip, "8-bit AdamW always updates"
        rate = learning_rate(step, self.config)
        for name, rows in self._local.items():
            gradient = self.weights[name].grad
            rows.grad = None if gradient is None else local_shard(gradient)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao's
                    group["lr"].fill_(rate * group["ratio"])
                else:
                    group["lr"] = rate * group["ratio"]
            optimizer.found_inf = skip  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for weight in self.weights.values():
            weight.grad = None
        return rate

    def state_tensors(self) -> dict[str, Slice]:
        """The state of the rows held here: plain tensors named "<moment>/<name of the weight>" that share its memory.

        Moments are float32, with the shape of the rows. 8-bit moments are uint8 codes "<moment>.codes/..." and float32
        "<moment>.scale/...", one number per block. Blocks lie inside rows, so that another number of ranks, which
        divides the rows differently, can read them.
        """
        tensors = {}
        for name, state in self._state.items():
            weight = self.weights[name]
            rows = local_range(weight)
            tensors[f"step/{name}"] = Slice(state["step"], (0, 1, 1))
            for moment in MOMENTS:
                value = state[moment]
                if block := self._block(name):
                    first, end, size = (n * weight.shape[1:].numel() // block for n in rows)
                    tensors[f"{moment}.codes/{name}"] = Slice(value.codes, rows)
                    tensors[f"{moment}.scale/{name}"] = Slice(value.scale, (first, end, size))
                else:
                    tensors[f"{moment}/{name}"] = Slice(value, rows)
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state_tensors` of an optimizer of the same kind. Raises ValueError for any other kind."""
        restore(self.state_tensors(), tensors)

    def _block(self, name: str) -> int:
        return state_block(self.weights[name].shape) if self._is_8bit else 0


def state_block(shape: torch.Size) -> int:
    """Numbers per block of the 8-bit state of a weight of `shape`, with one float32 scale per block; 0: float32 state.

    Blocks divide rows. Small weights, and the few whose rows cannot be divided into blocks of at least 64 numbers, have
    float32 state.
    """
    block = math.gcd(shape[1:].numel(), MAX_BLOCK)
    return block if len(shape) > 1 and block >= MIN_BLOCK and shape.numel() >= MIN_QUANTIZED else 0


def _zeros(rows: Tensor, block: int, signed: bool) -> Tensor:
    if block:
        return _torchao().subclass_8bit.OptimState8bit.zeros(rows.shape, signed, block, rows.device, rows.dtype)
    return torch.zeros_like(rows)


def _torchao() -> Any:
    try:
        import torchao.optim
        import torchao.optim.subclass_8bit
    except ImportError:
        raise ValueError(
            "train.optimizer adamw_8bit needs torchao, which is not installed; pip install torchao"
        ) from None
    return torchao.optim


def has_decay(name: str, weight: Tensor) -> bool:
    """Whether a weight decays: matrices and convolutions do, embeddings do not."""
    return weight.dim() >= 2 and not name.endswith(("embed_tokens.weight", "marker_embedding"))


@torch.no_grad()
def clip_gradients(weights: Iterable[Tensor], max_norm: float, world: World | None = None) -> Tensor:
    """Scale gradients down to a total norm of `max_norm` over all ranks; returns the norm they had, float32 []."""
    gradients = [local_shard(weight.grad) for weight in weights if weight.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    if world is not None and world.size > 1:
        norm = world.sum_tensor(norm.square()).sqrt()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
