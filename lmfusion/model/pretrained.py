"""What do transformers, peft and their users take for granted in a model? The same words, with this model's meaning.

What `PreTrainedModel` does rightly by itself (`.to`, `.eval`, `.device`, `.num_parameters`) is not repeated here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lmfusion.model import saving as serialization
from lmfusion.utils.devices import choose_device

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

IGNORED_OPTIONS = ("config", "low_cpu_mem_usage", "local_files_only", "trust_remote_code")
"""Arguments of transformers' from_pretrained that ask for what is done anyway."""


class PreTrainedMethods(PreTrainedModel):
    """`LMFusion` as a model of transformers."""

    supports_gradient_checkpointing = True

    @property
    def dtype(self) -> torch.dtype:
        """That of the text weights; the codec may have another."""
        return self._model.text.norm.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The base LLM's embedding."""
        return self._model.text.embed_tokens

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise ValueError("the vocabulary is the base LLM's and cannot be resized; do that to the LLM before from_llm")

    def get_output_embeddings(self) -> nn.Module | None:
        """The base LLM's head; None where it is the embedding."""
        return self._model.text.lm_head

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Keep next to nothing of a layer for its backward, and compute it again: `model.recompute = "layer"`.

        activation_checkpointing_kwargs are for torch's checkpoint, which is not used here. Raises ValueError for
        settings that do not apply: every_n_layers, offload.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"every_n_layers is {every_n_layers} and offload {offload}; layers are all recomputed and nothing is "
                "offloaded. To keep more for the backward set model.recompute = 'ffn'"
            )
        self._model.recompute = "layer"

    def activation_checkpointing_disable(self) -> None:
        """`model.recompute = "none"`."""
        self._model.recompute = "none"

    @property
    def is_activation_checkpointing(self) -> bool:
        return self._model.recompute != "none"

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.is_activation_checkpointing

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        raise ValueError("save the model and upload its folder: save_pretrained(FOLDER), then `hf upload NAME FOLDER`")

    def save_text(self, path: str | Path) -> None:
        """Save the text tower alone as the LLM it is, for transformers' AutoModelForCausalLM and others.

        path: a folder that does not exist or is empty. Raises ValueError for another, OSError when writing fails.
        """
        serialization.save_text(self._model, Path(path))

    @property
    def _model(self) -> "LMFusion":
        return cast("LMFusion", self)


@dataclass(frozen=True)
class LoadingOptions:
    """What was asked of from_pretrained in transformers' words."""

    dtype: torch.dtype | None
    """Of the weights; None: as they were saved."""
    device: torch.device | None
    """Where to; None: the CPU."""
    adapter: str | None
    """Folder of an adapter of peft's to load too; AutoModel names it where that is the folder it was given."""

    @classmethod
    def of(cls, dtype: torch.dtype | str | None, others: dict[str, Any]) -> "LoadingOptions":
        """From `dtype` and the other arguments by name.

        others: transformers' `torch_dtype` (the older name of dtype), `device_map` (one device), what asks for nothing
        that is not done anyway, and arguments that are None or False. Raises ValueError for any other.
        """
        known = (*IGNORED_OPTIONS, "torch_dtype", "device_map", "adapter_kwargs")
        unknown = [name for name, value in others.items() if value and name not in known]
        if unknown:
            raise ValueError(
                f"unknown argument {unknown[0]!r}; LMFusion.from_pretrained takes path, base, dtype, codec_path and "
                "device_map"
            )
        dtype = others.get("torch_dtype") if dtype is None else dtype
        if isinstance(dtype, str):
            if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ValueError(f"dtype is {dtype!r}; it is a torch.dtype, its name such as 'bfloat16', or 'auto'")
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        device_map = others.get("device_map")
        device = None if device_map is None else _device(device_map)
        return cls(dtype, device, (others.get("adapter_kwargs") or {}).get("_adapter_model_path"))


def _device(device_map: Any) -> torch.device:
    place = device_map[""] if isinstance(device_map, dict) and list(device_map) == [""] else device_map
    if place in ("auto", "cpu", "cuda"):
        return choose_device(place, "device_map")
    try:
        device = torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map is {device_map!r}, but a model lies on one device: 'auto', 'cpu', 'cuda', 'cuda:1', {{'': 1}}"
        ) from error
    if device.type == "cuda":
        choose_device("cuda", "device_map")  # raises where there is none
    return device
