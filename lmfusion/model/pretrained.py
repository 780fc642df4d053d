"""What transformers, peft and their users expect of any model, with its meaning for `LMFusion`.

Methods of `PreTrainedModel` that work as they are (`.to`, `.eval`, `.device`, `.num_parameters`) are not repeated here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lmfusion.model.codec import Codec
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.records import BaseRecord, TrainingRecord
from lmfusion.model.towers import ImageTower, TextTower
from lmfusion.model.vision import VisionEncoder
from lmfusion.utils.devices import choose_device

IGNORED_OPTIONS = ("config", "low_cpu_mem_usage", "local_files_only", "trust_remote_code")
"""Arguments of transformers' from_pretrained that ask for what happens anyway."""


class PreTrainedMethods(PreTrainedModel):
    """The attributes of `LMFusion`, and its methods that transformers and peft call."""

    config: LMFusionConfig
    text: TextTower
    """The base LLM, frozen unless `freeze_text(False)` is called."""
    image: ImageTower
    """All weights that are trained."""
    vision: VisionEncoder | None
    """A vision-language base's vision encoder and projector, frozen; None where the base is an LLM."""
    codec: Codec
    """Between pixels and latents, frozen."""
    tokenizer: Any
    """The base's, or None."""
    base: BaseRecord | None
    """Where `text` and `vision` came from, and their digests."""
    trained: TrainingRecord | None
    """How the image tower was trained, if that is known."""
    recompute: str
    """What a layer's backward computes again instead of keeping it: see `lmfusion_kernels.routed_block`."""
    supports_gradient_checkpointing = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the text weights; the codec may have another."""
        return self.text.norm.weight.dtype

    @property
    def tokens_per_image(self) -> int:
        """Tokens that an image of the configured size takes."""
        return self.image.patch_coder.tokens_per_image(self.codec.latent_size, self.codec.latent_size)

    @property
    def frozen_text(self) -> bool:
        """Whether the text tower is frozen. Batches must be packed with the same `frozen_text`."""
        return not self.text.norm.weight.requires_grad

    def freeze_text(self, frozen: bool = True) -> None:
        """Freeze the text tower (the state a model starts in), or make it trainable."""
        self.text.requires_grad_(not frozen)
        self.text.train(self.training and not frozen)
        if not frozen and self.base is not None:
            self.base.may_differ = True

    def train(self, mode: bool = True) -> "PreTrainedMethods":
        """As for any module, except that a frozen text tower, codec and vision encoder stay in evaluation mode."""
        super().train(mode)
        self.codec.eval()
        if self.vision is not None:
            self.vision.eval()
        self.text.train(mode and not self.frozen_text)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The base LLM's embedding."""
        return self.text.embed_tokens

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise ValueError("the vocabulary is the base LLM's and cannot be resized; do that to the LLM before from_llm")

    def get_output_embeddings(self) -> nn.Module | None:
        """The base LLM's head; None where it is the embedding."""
        return self.text.lm_head

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Keep almost nothing of a layer for its backward, and recompute it: `model.recompute = "layer"`.

        activation_checkpointing_kwargs are for torch's checkpoint, which is not used here. Raises ValueError for
        settings that do not apply: every_n_layers, offload.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                "every_n_layers must be 1 and offload False, since all layers are recomputed and nothing is offloaded, "
                f"got {every_n_layers} and {offload}; to keep more for the backward set model.recompute = 'ffn'"
            )
        self.recompute = "layer"

    def activation_checkpointing_disable(self) -> None:
        """`model.recompute = "none"`."""
        self.recompute = "none"

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.recompute != "none"

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


@dataclass(frozen=True)
class LoadingOptions:
    """Arguments of from_pretrained that have transformers' names."""

    dtype: torch.dtype | None
    """Of the weights; None: as they were saved."""
    device: torch.device | None
    """The device to load onto; None: the CPU."""
    adapter: str | None
    """Folder of a peft adapter to load too. AutoModel passes it where it was given the folder of an adapter."""

    @classmethod
    def parse(cls, dtype: torch.dtype | str | None, others: dict[str, Any]) -> "LoadingOptions":
        """From `dtype` and the other arguments by name.

        others: transformers' `torch_dtype` (the older name of dtype), `device_map` (one device), IGNORED_OPTIONS, and
        arguments that are None or False. Raises ValueError for any other.
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
                raise ValueError(f"dtype must be a torch.dtype, its name such as 'bfloat16', or 'auto', got {dtype!r}")
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        device_map = others.get("device_map")
        device = None if device_map is None else _device(device_map)
        return cls(dtype, device, (others.get("adapter_kwargs") or {}).get("_adapter_model_path"))


def _device(device_map: Any) -> torch.device:
    name = device_map[""] if isinstance(device_map, dict) and list(device_map) == [""] else device_map
    if name in ("auto", "cpu", "cuda"):
        return choose_device(name, "device_map")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map must name one device, such as 'auto', 'cpu', 'cuda', 'cuda:1' or {{'': 1}}, got {device_map!r}"
        ) from error
    if device.type == "cuda":
        choose_device("cuda", "device_map")  # raises where there is none
    return device
