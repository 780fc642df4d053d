"""Loads a layer from a checkout of another project, without installing or copying it.

BAGEL's layer and NeMo Automodel's port of it have the same parameters, so one adapter fills both. An environment
variable names the checkout; none of its code is part of this project.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import lmfusion_kernels as lk
from benchmarks.harness.compare import UnavailableError
from benchmarks.harness.layer import LayerCase


def import_from(variable: str, url: str, packages: Sequence[str], module: str) -> ModuleType:
    """Import `module` from the checkout that the environment variable names.

    packages: those on the way to it, whose __init__ would import much more than one layer; they become empty.
    Raises UnavailableError without the variable, or where the import fails, with the reason.
    """
    checkout = os.environ.get(variable)
    if not checkout:
        raise UnavailableError(f"git clone {url}, then set {variable} to the clone")
    root = Path(checkout).expanduser()
    if not root.joinpath(*packages[0].split(".")).is_dir():
        raise UnavailableError(
            f"{variable}={checkout} holds no folder {packages[0]!r}; it should name a clone of {url}"
        )
    import transformers.modeling_utils  # noqa: F401 - it probes for flash_attn, so import it before the stub exists

    if importlib.util.find_spec("flash_attn") is None:
        _package("flash_attn").flash_attn_varlen_func = None  # imported by name, used only in inference
    for name in packages:
        _package(name, root.joinpath(*name.split(".")))
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise UnavailableError(f"{module} of {root} cannot be imported: {type(error).__name__}: {error}") from error


def _package(name: str, folder: Path | None = None) -> Any:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = [] if folder is None else [str(folder)]
    sys.modules[name] = module
    return module


@torch.no_grad()
def fill(layer: nn.Module, case: LayerCase) -> None:
    """Copy the case's weights into a layer with BAGEL's parameter names."""
    shape = case.shape
    sizes = [shape.num_heads * shape.head_dim] + 2 * [shape.num_kv_heads * shape.head_dim]
    parameters = dict(layer.named_parameters())
    for weights, tower in ((case.text, ""), (case.image, "_moe_gen")):
        assert weights.qkv_bias is not None and weights.q_norm is not None and weights.k_norm is not None
        for name, weight, bias in zip("qkv", weights.qkv_proj.split(sizes), weights.qkv_bias.split(sizes), strict=True):
            parameters.pop(f"self_attn.{name}_proj{tower}.weight").copy_(weight)
            parameters.pop(f"self_attn.{name}_proj{tower}.bias").copy_(bias)
        gate, up = weights.gate_up_proj.chunk(2)
        for name, value in {
            f"self_attn.o_proj{tower}": weights.o_proj,
            f"self_attn.q_norm{tower}": weights.q_norm,
            f"self_attn.k_norm{tower}": weights.k_norm,
            f"mlp{tower}.gate_proj": gate,
            f"mlp{tower}.up_proj": up,
            f"mlp{tower}.down_proj": weights.down_proj,
            f"input_layernorm{tower}": weights.input_layernorm,
            f"post_attention_layernorm{tower}": weights.post_attention_layernorm,
        }.items():
            parameters.pop(f"{name}.weight").copy_(value)
    if parameters:
        raise UnavailableError(f"the layer has unknown parameters: {', '.join(parameters)}")


def set_trained(layer: nn.Module, freezes_text: bool) -> None:
    """Call requires_grad_(False) on the text half if asked to."""
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not freezes_text or "_moe_gen" in name)


def block_mask(layout: lk.TokenLayout) -> BlockMask:
    """The peers' own kind of mask, as their trainers build it each step."""
    start, end, visible_end = layout.key_start, layout.key_end, layout.mask.query_end  # without a cache

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= start[query]) & (key < end[query]) & (query < visible_end[key])

    n = layout.num_tokens
    return create_block_mask(sees, None, None, n, n, device=str(layout.device), _compile=layout.device.type == "cuda")


def attention_for(case: LayerCase) -> tuple[Callable[..., Tensor] | None, Any]:
    """The replacement of the peer's compiled FlexAttention, and the mask to pass: None and a BlockMask on a GPU.

    A CPU gets our attention, so that the rest of the layer is compared: compiled Flex has no backward there.
    """
    if case.device.type == "cuda":
        return None, block_mask(case.layout)

    def attend(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool, block_mask: Any) -> Tensor:
        q, k, v = (heads[0].transpose(0, 1) for heads in (q, k, v))
        return lk.hybrid_attention(q, k, v, case.layout).transpose(0, 1)[None]

    return attend, case.layout
