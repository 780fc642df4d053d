"""What is the weight of a projection that peft has put LoRA on? The base's, plus every update in force.

The kernels are given weights and never call the projections, so what peft's own `forward` would do must be done to the
weight. peft is not imported: the modules it puts in place of a projection are known by their `base_layer`, and asked.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_adapted(projection: nn.Module) -> bool:
    """Whether peft has put its own module in the place of this one."""
    return "base_layer" in projection._modules


def effective_weight(projection: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that `projection` maps rows with, in `dtype`, differentiable.

    An nn.Linear's own, or W + sum of scaling * B A over the active adapters where peft has wrapped it: on, off, merged
    or not, as peft was told. The sum is taken in the wider of both dtypes. Raises ValueError for an adapter that is
    more than such a sum: dropout while training, DoRA and other variants, lora_bias, kinds other than LoRA.
    """
    weight = _adapted_weight(projection) if is_adapted(projection) else projection.weight
    assert isinstance(weight, Tensor)
    return weight.to(dtype)


def _adapted_weight(layer: Any) -> Tensor:
    base = layer.base_layer
    if not isinstance(base, nn.Linear):
        raise ValueError(f"an adapter lies on a {type(base).__name__}; adapters on adapters do not work")
    if any("adapter_names" in (getattr(hook, "keywords", None) or {}) for hook in layer._forward_pre_hooks.values()):
        raise ValueError("adapter_names= gives every row its own adapter, which one weight cannot; use set_adapter")
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as peft's forward does
    weight: Tensor = base.weight
    if layer.disable_adapters or layer.merged:
        return weight
    updates = getattr(layer, "lora_A", None)
    if updates is None:
        raise ValueError(f"{type(layer).__module__} puts no LoRA on a projection; of peft's adapters, LoRA works here")
    for name in layer.active_adapters:
        if name in updates:
            _check_is_a_sum(layer, name)
            weight = weight + layer.get_delta_weight(name)
    return weight


def _check_is_a_sum(layer: Any, name: str) -> None:
    """Whether W + scaling * B A is all that peft's forward would do with adapter `name`."""
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
