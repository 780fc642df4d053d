"""How do the trained weights move? AdamW, a warm-up and a cosine, and which weights decay."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lmfusion.training.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of a weight, by torch's names."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of the update that ends step number `step` (from 0): a linear warm-up, then a cosine that ends at the minimum."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


class Optimizer:
    """AdamW over named weights. Weights named `text.` move at `text_learning_rate_ratio` of the learning rate."""

    def __init__(self, weights: dict[str, nn.Parameter], config: TrainConfig) -> None:
        if not weights:
            raise ValueError("the model has no weights to train")
        self.config = config
        self.weights = weights
        groups = []
        kinds = {name: (name.startswith("text."), has_decay(name, weight)) for name, weight in weights.items()}
        for kind in sorted(set(kinds.values())):
            is_text, decays = kind
            groups.append(
                {
                    "params": [weight for name, weight in weights.items() if kinds[name] == kind],
                    "weight_decay": config.weight_decay if decays else 0.0,
                    "ratio": config.text_learning_rate_ratio if is_text else 1.0,
                }
            )
        fused = all(w.device.type in ("cpu", "cuda") for w in weights.values())
        self._adamw = torch.optim.AdamW(groups, config.learning_rate, config.betas, config.eps, fused=fused)

    def step(self, step: int) -> float:
        """Update the weights from their gradients and drop these; answer with the learning rate of `step`."""
        rate = learning_rate(step, self.config)
        for group in self._adamw.param_groups:
            group["lr"] = rate * group["ratio"]
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return rate

    def state_tensors(self) -> dict[str, Tensor]:
        """The running moments of every weight that has had an update, float32, by "<moment>/<name of the weight>"."""
        return {
            f"{moment}/{name}": state[moment]
            for name, weight in self.weights.items()
            if (state := self._adamw.state.get(weight))
            for moment in MOMENTS
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state_tensors` of an optimizer over weights of the same names and shapes."""
        for name, weight in self.weights.items():
            if f"step/{name}" in tensors:
                self._adamw.state[weight] = {
                    moment: tensors[f"{moment}/{name}"].to(weight.device, copy=True) for moment in MOMENTS
                }


def has_decay(name: str, weight: Tensor) -> bool:
    """Whether weight decay pulls on a weight: matrices and convolutions, but no embeddings."""
    return weight.dim() >= 2 and not name.endswith(("embed_tokens.weight", "marker_embedding"))


def clip_gradients(weights: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a total norm of `max_norm`; answer with the norm they had."""
    return nn.utils.clip_grad_norm_(weights, max_norm, foreach=True)
