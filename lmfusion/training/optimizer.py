"""How do the trained weights move? AdamW, a warm-up and a cosine, and which weights decay.

A rank moves the rows it holds and knows nothing of the others.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmfusion.training.checkpoint import Slice, restore
from lmfusion.training.config import TrainConfig
from lmfusion.training.distributed import World, local_range, local_shard

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a weight, by torch's names; "step" is the third."""
MAX_BLOCK, MIN_BLOCK, MIN_QUANTIZED = 256, 64, 4096


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of the update that ends step number `step` (from 0): a linear warm-up, then a cosine that ends at the minimum."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


class Optimizer:
    """AdamW over named weights. Weights named `text.` move at `text_learning_rate_ratio` of the learning rate.

    `config.optimizer` is "adamw" (moments in float32) or "adamw_8bit" (moments in blocks of 8-bit codes, by torchao).
    """

    def __init__(self, weights: Mapping[str, Tensor], config: TrainConfig) -> None:
        """weights: float32, on their final device, sharded by FSDP2 or not. Raises ValueError where there are none."""
        if not weights:
            raise ValueError("the model has no weights to train")
        self.config = config
        self.weights = weights
        # Plain tensors that share the weights' memory, so that no DTensor reaches the optimizer
        held = {name: local_shard(weight.detach()) for name, weight in weights.items()}
        self._local = {name: rows for name, rows in held.items() if rows.numel()}
        self._is_8bit = config.optimizer == "adamw_8bit"
        # torchao compiles its update for each shape, so it gets the weights that gain by it
        coded = {name: rows for name, rows in self._local.items() if self._block(name)}
        plain = {name: rows for name, rows in self._local.items() if name not in coded}
        options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
        self._optimizers: list[torch.optim.Optimizer] = []
        if plain:
            fused = all(rows.device.type in ("cpu", "cuda") for rows in plain.values())
            self._optimizers.append(torch.optim.AdamW(self._groups(plain), fused=fused, **options))
        if self._is_8bit:
            adamw_8bit = _torchao().AdamW8bit  # missing, it is missed whatever the weights are
            if coded:
                self._optimizers.append(adamw_8bit(self._groups(coded), **options))
        self._state: dict[str, dict[str, Any]] = {}
        for name, rows in self._local.items():  # now, so that a lack of memory shows before the first step
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
                "ratio": self.config.text_learning_rate_ratio if is_text else 1.0,
            }
            for is_text, decays in sorted(set(kinds.values()))
        ]

    @property
    def can_skip(self) -> bool:
        """Whether `step` takes `skip`. If not, ask on the host whether the gradients are finite before each step."""
        return not self._is_8bit

    def step(self, step: int, skip: Tensor | None = None) -> float:
        """Update the weights from their gradients and drop these; answer with the learning rate of `step`.

        skip: float32 [] on the weights' device; where it is 1, nothing changes, and the host need not know.
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
        """The state of the rows held here, plain tensors by "<moment>/<name of the weight>", sharing its memory.

        Moments are float32 like the rows they belong to. 8-bit ones are uint8 codes "<moment>.codes/..." and float32
        "<moment>.scale/...", one number a block; blocks lie inside rows, so that other ranks may hold other rows.
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
        """Continue from `state_tensors` of an optimizer of the same kind. Raises ValueError for another one's."""
        restore(self.state_tensors(), tensors)

    def _block(self, name: str) -> int:
        return state_block(self.weights[name].shape) if self._is_8bit else 0


def state_block(shape: torch.Size) -> int:
    """Numbers a block of the 8-bit state of a weight of `shape`: each block has a float32 scale; 0: kept in float32.

    Blocks divide rows. Small weights, and those whose rows do not come in blocks of at least 64, are few.
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
        raise ValueError("train.optimizer is 'adamw_8bit', which needs torchao; pip install torchao") from None
    return torchao.optim


def has_decay(name: str, weight: Tensor) -> bool:
    """Whether weight decay pulls on a weight: matrices and convolutions, but no embeddings."""
    return weight.dim() >= 2 and not name.endswith(("embed_tokens.weight", "marker_embedding"))


@torch.no_grad()
def clip_gradients(weights: Iterable[Tensor], max_norm: float, world: World | None = None) -> Tensor:
    """Scale gradients down to a total norm over all ranks of `max_norm`; answer with the norm they had, float32 []."""
    gradients = [local_shard(weight.grad) for weight in weights if weight.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    if world is not None and world.size > 1:
        norm = world.sum_tensor(norm.square()).sqrt()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
