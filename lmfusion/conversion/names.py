"""Names of tensors in files and in memory: the only place that stacks, splits and renames weights.

In files: Llama's names (q_proj, k_proj, v_proj, gate_proj, up_proj) under `text.` and `image.`. In memory: one matrix
`qkv_proj` and one `gate_up_proj` per layer, so that each takes one matrix product. In a Llama checkpoint the text
tower's tensors begin with `model.`, except for `lm_head`. The tensors of a VLM's vision encoder are under `vision.`
with transformers' names, in files and in memory.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lmfusion.conversion.model_limits import head_dim_of

_STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_STACKED_NAME = re.compile(r"(.*)\.(qkv_proj|gate_up_proj)\.(weight|bias)")
_PART_NAME = re.compile(r"((?:text|image)\..*)\.([qkv]_proj|gate_proj|up_proj)\.(weight|bias)")


def split(tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """From memory names to file names; stacked tensors become contiguous parts. config: the base LLM's."""
    head_dim = head_dim_of(config)
    qkv = [n * head_dim for n in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
    named = {}
    for name, tensor in tensors.items():
        match = _STACKED_NAME.fullmatch(name)
        if match is None:
            named[name] = tensor
            continue
        prefix, stack_name, kind = match.groups()
        sizes = qkv if stack_name == "qkv_proj" else [tensor.shape[0] // 2] * 2
        for part, rows in zip(_STACKED[stack_name], tensor.split(sizes), strict=True):
            named[f"{prefix}.{part}.{kind}"] = rows.contiguous()
    return named


def stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """From file names to memory names. Empties `tensors` as it goes, so that at most one layer is held twice."""
    named = {}
    for name in list(tensors):
        match = _PART_NAME.fullmatch(name)
        if match is None:
            named[name] = tensors.pop(name)
            continue
        prefix, part, kind = match.groups()
        for stack_name, parts in _STACKED.items():
            if part == parts[0]:
                named[f"{prefix}.{stack_name}.{kind}"] = torch.cat([tensors.pop(f"{prefix}.{p}.{kind}") for p in parts])
    return named


def from_llama(name: str) -> str:
    """File name of the tensor that a Llama checkpoint calls `name`."""
    return "text." + name.removeprefix("model.")


def to_llama(name: str) -> str:
    """The name in a Llama checkpoint of the text tensor with this file name; other names stay as they are."""
    if not name.startswith("text."):
        return name
    plain = name.removeprefix("text.")
    return plain if plain.startswith("lm_head.") else "model." + plain


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError naming the first tensors that are missing, unexpected or misshapen. `where`: the source."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{where} lacks {len(missing)} tensor(s), first {missing[0]!r}; is the file complete?")
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        raise ValueError(
            f"{where} has {len(unexpected)} tensor(s) that do not belong to this architecture, first {unexpected[0]!r}"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{where}: {name!r} must have the configuration's shape {tuple(expected[name].shape)}, got "
                f"{tuple(tensor.shape)}"
            )
