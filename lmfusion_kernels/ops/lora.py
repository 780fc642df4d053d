"""Computes the weight of a projection with LoRA by peft: the base weight plus every active update.

The kernels take weights and never call the projections, so the effect of peft's own `forward` must be applied to the
weight. peft is not imported: its modules in place of a projection are recognised by their `base_layer`.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_adapted(projection: nn.Module) -> bool:
    """Whether peft has replaced this module by its own."""
    return "base_layer" in projection._modules


def effective_weight(projection: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that `projection` maps rows with, in `dtype`, differentiable.

    An nn.Linear's own weight, or W + sum of scaling * B A over the active adapters if peft has wrapped it. Disabled
    and merged adapters are respected. The sum is taken in the wider of both dtypes. Raises ValueError for an adapter
    that is more than such a sum: dropout while training, DoRA and other variants, lora_bias, kinds other than LoRA.
    """
    weight = _adapted_weight(projection) if is_adapted(projection) else projection.weight
    assert isinstance(weight, Tensor)
    return weight.to(dtype)


def _adapted_weight(layer: Any) -> Tensor:
    base = layer.base_layer
    if not isinstance(base, nn.Linear):
        raise ValueError(
            f"an adapter must be on an nn.Linear, got one on a {type(base).__name__}; adapters on adapters do not work"
        )
    if any("adapter_names" in (getattr(hook, "keywords", None) or {}) for hook in layer._forward_pre_hooks.values()):
        raise ValueError(
            "adapter_names= gives every row its own adapter, which one weight cannot express; use set_adapter"
        )
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as peft's forward does
    weight: Tensor = base.weight
    if layer.disable_adapters or layer.merged:
        return weight
    updates = getattr(layer, "lora_A", None)
    if updates is None:
        raise ValueError(
            f"an adapter must be LoRA, got {type(layer).__module__}; other adapters of peft do not work here"
        )
    for name in layer.active_adapters:
        if name in updates:
            _check_is_a_sum(layer, name)
            weight = weight + layer.get_delta_weight(name)
    return weight


def _check_is_a_sum(layer: Any, name: str) -> None:
    """Raise ValueError unless peft's forward with adapter `name` computes exactly W + scaling * B A."""
    dropout = layer.lora_dropout[name]
    variant = layer.lora_variant.get(name)
    reason = ""
    if variant is not None:
        reason = f"is a variant of LoRA ({type(variant).__name__}); leave use_dora and the like off"
    elif layer.lora_bias.get(name):
        reason = "has a bias; set lora_bias=False"
    elif dropout.training and getattr(dropout, "p", 0) > 0:
        reason = f"has lora_dropout {dropout.p}, which drops inputs that the kernels never see; set lora_dropout=0"
    if reason:
        raise ValueError(f"adapter {name!r} {reason}: the layers take it as a plain sum, W + scaling * B A")
