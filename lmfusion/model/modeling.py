"""How do text and images become a loss, logits and predictions? `LMFusion`: two towers around shared attention."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from transformers import AutoModel
from transformers.utils import ModelOutput

import lmfusion_kernels as lk
from lmfusion import generation
from lmfusion.conversion import load_base
from lmfusion.conversion.architectures import check_supported, sliding_window
from lmfusion.generation import Answer, Event, PromptLike
from lmfusion.images.preprocessing import ImageSource
from lmfusion.model import saving as serialization
from lmfusion.model.batch import IGNORED, Batch
from lmfusion.model.codec import Codec, CodecConfig, load_codec
from lmfusion.model.configuration import ImageTowerConfig, LMFusionConfig, check_numbers
from lmfusion.model.diffusion import Diffusion, DiffusionConfig
from lmfusion.model.model_card import TrainingRecord
from lmfusion.model.patch_coder import Skip
from lmfusion.model.pretrained import LoadingOptions, PreTrainedMethods
from lmfusion.model.saved_files import BaseRecord
from lmfusion.model.towers import ImageTower, TextTower
from lmfusion.model.vision import VisionEncoder

MAX_LOGITS = 2**24
"""Held at a time of rows whose logits have no gradient: 64 MiB in float32."""
KeyValueCaches = Sequence[tuple[Tensor, Tensor]]
"""One pair a layer: keys and values [num_keys, H_kv, D] of a cached layout."""


@dataclass
class LMFusionOutput(ModelOutput):
    """What `LMFusion.forward` gives: with `input_ids` the logits, with a batch everything else."""

    loss: Tensor | None = None
    """lm_loss_sum / num_labels + begin_loss_sum / num_boi_targets + loss_weight * diffusion_loss_sum / num_target_images"""
    lm_loss_sum: Tensor | None = None
    """Cross-entropy summed over the labels, in nats"""
    num_labels: int | None = None
    begin_loss_sum: Tensor | None = None
    """Of the rows before each document's first image, with a frozen text tower: how surprising it is to the rows of BOI
    and EOI that an image begins there, or that none does. Summed over these decisions, in nats"""
    num_boi_targets: int | None = None
    diffusion_loss_sum: Tensor | None = None
    """Mean squared error of each image that is drawn, summed over them"""
    num_target_images: int | None = None
    logits: Tensor | None = None
    """[B, T, V]"""


class LMFusion(PreTrainedMethods):
    """A text LLM and an image tower beside it. Make one with `from_llm`, load one with `from_pretrained`.

    text: the base LLM, frozen unless `freeze_text(False)` is called. image: everything that is trained. vision: what a
    vision-language model sees with, frozen; None where the base is an LLM. codec: frozen, between pixels and latents.
    tokenizer: the base's, or None. base: where text and vision came from, and their digests. trained: how the image
    tower was, if that is known.
    """

    config: LMFusionConfig
    config_class = LMFusionConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: LMFusionConfig, codec: Codec | None = None) -> None:
        """A model with random weights. codec: one that is already loaded; None loads the one `config` names."""
        super().__init__(config)
        check_supported(config.text_config, "text_config")
        check_numbers(config.text_config)
        with torch.device("cpu"):  # also while the towers are being built on the meta device
            self.codec = load_codec(config.codec) if codec is None else codec
            self.diffusion = Diffusion(config.diffusion)
            self.vision = None if config.vlm_config is None else VisionEncoder(config.vlm_config)
        self.text = TextTower(config.text_config)
        self.image = ImageTower(config, self.codec.latent_channels)
        self.tokenizer: Any = None
        self.base: BaseRecord | None = None
        self.trained: TrainingRecord | None = None
        self.compute_dtype: torch.dtype | None = None
        """dtype of the rows; None: that of the text weights. Weights in another dtype are cast as they are used."""
        self.recompute = "none"
        """What a layer's backward computes again instead of keeping it: see `lmfusion_kernels.routed_block`."""
        self.boi_token_id: int = config.text_config.vocab_size
        self.eoi_token_id: int = config.text_config.vocab_size + 1
        if not self.image.marker_embedding.is_meta:
            self.image.initialize(self.text)
        self.freeze_text()

    @classmethod
    def from_llm(
        cls,
        path: str | Path,
        image: ImageTowerConfig | dict[str, Any] | None = None,
        codec: CodecConfig | dict[str, Any] | None = None,
        diffusion: DiffusionConfig | dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> "LMFusion":
        """A model around the LLM at `path`, its image tower started from it and ready to be trained.

        path: a Hugging Face folder, a GGUF file, or a name on the hub. image, codec, diffusion: configurations, or
        dicts of their fields; None for the defaults. dtype: of the weights; None keeps the checkpoint's (float32 for
        GGUF). seed: of the weights that are drawn.

        Raises FileNotFoundError and ValueError as `lmfusion.conversion.load_base` and the configurations do.
        """
        base = load_base(path, dtype, is_vlm=False)
        return serialization.from_base(cls, base, image, codec, diffusion, seed)

    @classmethod
    def from_vlm(
        cls,
        path: str | Path,
        image: ImageTowerConfig | dict[str, Any] | None = None,
        codec: CodecConfig | dict[str, Any] | None = None,
        diffusion: DiffusionConfig | dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> "LMFusion":
        """A model around the vision-language model at `path` (LLaVA-NeXT or LLaVA): LLaVAFusion in LMFusion's paper.

        Its vision encoder, projector and LLM are frozen; the image tower stands beside the LLM's layers as `from_llm`
        puts it. Images that are shown to the model go through its own encoder and become rows of the text tower; images
        that it draws are the image tower's. path: a Hugging Face folder, or a name on the hub. The rest, and errors,
        are those of `from_llm`.
        """
        base = load_base(path, dtype, is_vlm=True)
        return serialization.from_base(cls, base, image, codec, diffusion, seed)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        base: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        codec_path: str | Path | None = None,
        **kwargs: Any,
    ) -> "LMFusion":
        """The model saved in the folder `path`.

        base: where its base LLM is now, if it is not where it was. It must be the same LLM: every tensor's sha256 is
        compared. codec_path: where the folder of its autoencoder is now, if it has moved; the sha256 of its weights is
        compared. Both places are kept when the model is saved again. dtype: of the weights; None keeps them as they
        were saved. kwargs: those of transformers that apply here, see `lmfusion.model.pretrained.LoadingOptions`; device_map
        names the one device that the model is put on.

        Raises FileNotFoundError when a file or the base is missing, ValueError when one is damaged or differs.
        """
        options = LoadingOptions.of(dtype, kwargs)
        model = serialization.load(cls, Path(path), base, options.dtype, codec_path)
        if options.adapter is not None:
            model.load_adapter(options.adapter)
        return model if options.device is None else model.to(options.device)  # type: ignore[arg-type]

    def save_pretrained(self, path: str | Path, parts: str = "image") -> None:  # type: ignore[override]
        """Save into the folder `path`: config.json, base.json, safetensors, tokenizer and a model card.

        parts: "image" (all that was trained; the base LLM and an autoencoder are loaded from where they are, and
        checked) or "all". An autoencoder that lies in `path` itself stays there.

        A model already saved there is kept until the new one is complete, and what was changed in its model card
        stays. Raises ValueError for a folder that holds something else, for a model with peft's adapters on it, or for
        parts="image" after training the text tower or where the base LLM is gone; OSError when writing fails.
        """
        serialization.save(self, Path(path), parts)

    @property
    def frozen_text(self) -> bool:
        """Whether the text tower is left as it is. Batches must be packed with the same `frozen_text`."""
        return not self.text.norm.weight.requires_grad

    def freeze_text(self, frozen: bool = True) -> None:
        """Freeze the text tower (the state a model starts in), or make it trainable."""
        self.text.requires_grad_(not frozen)
        self.text.train(self.training and not frozen)
        if not frozen and self.base is not None:
            self.base.may_differ = True

    def train(self, mode: bool = True) -> "LMFusion":
        """As for any module, except that a frozen text tower, codec and vision encoder stay in evaluation mode."""
        super().train(mode)
        self.codec.eval()
        if self.vision is not None:
            self.vision.eval()
        self.text.train(mode and not self.frozen_text)
        return self

    @property
    def tokens_per_image(self) -> int:
        """Rows that an image of the configured size takes."""
        return self.image.patch_coder.tokens_per_image(self.codec.latent_size, self.codec.latent_size)

    def stream(self, prompt: PromptLike, chat: bool = False, **options: Any) -> Iterator[Event]:
        """Events of one answer as they happen: text, images with previews, the end.

        See `lmfusion.generation.stream_answer`; options: the fields of `GenerationOptions`.
        """
        return generation.stream_answer(self, prompt, chat=chat, **options)

    def generate(
        self, prompts: Sequence[PromptLike], chat: bool = False, batch_size: int = 8, **options: Any
    ) -> list[Answer]:
        """An answer to each prompt, of text, and of images where max_images allows them.

        See `lmfusion.generation.generate_answers`; options: the fields of `GenerationOptions`.
        """
        return generation.generate_answers(self, prompts, chat=chat, batch_size=batch_size, **options)

    def draw(self, prompts: Sequence[PromptLike], **options: Any) -> list[Image]:
        """An image of each prompt; `options` are those of `lmfusion.generation.draw_images`."""
        return generation.draw_images(self, prompts, **options)

    def caption(self, images: Sequence[ImageSource], **options: Any) -> list[str]:
        """A caption of each image; `options` are those of `lmfusion.generation.caption_images`."""
        return generation.caption_images(self, images, **options)

    def embed(self, token_ids: Tensor, vision_embeds: Tensor | None = None) -> Tensor:
        """Text-tower rows [n, d_text] of token ids (integer [n]), BOI and EOI among them.

        vision_embeds: [num_vision, d_text] of images that are seen; where the id is -1 - k, its row k stands.
        """
        vocab_size = self.boi_token_id
        is_marker = token_ids >= vocab_size
        rows = F.embedding(token_ids.clamp(0, vocab_size - 1), self.text.embedding_weight)
        markers = F.embedding((token_ids - vocab_size).clamp(min=0), self.image.marker_embedding)
        rows = torch.where(is_marker[:, None], markers.to(rows.dtype), rows)
        if vision_embeds is not None and vision_embeds.shape[0]:
            seen = vision_embeds.to(rows.dtype).index_select(0, (-1 - token_ids).clamp(min=0))
            rows = torch.where((token_ids < 0)[:, None], seen, rows)
        return rows.to(self._dtype)

    def encode_images(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Skip | None]:
        """Image-tower rows [B * L, d_image] of (noisy) latents [B, C, h, w] at `timesteps` int64 [B], and the skip."""
        if latents.shape[0] == 0:
            return latents.new_zeros(0, self.config.image_hidden_size, dtype=self._dtype), None
        rows, skip = self.image.patch_coder.encode(latents, timesteps)
        return rows.to(self._dtype), skip

    def decode_images(self, h_image: Tensor, timesteps: Tensor, skip: Skip | None) -> Tensor:
        """Predictions [B, C, h, w] of the diffusion from image rows after `run_layers`."""
        if skip is None:
            return h_image.new_zeros(0, self.codec.latent_channels, self.codec.latent_size, self.codec.latent_size)
        return self.image.patch_coder.decode(h_image, timesteps, skip)

    def run_layers(
        self, x_text: Tensor, x_image: Tensor, layout: lk.TokenLayout, kv_caches: KeyValueCaches | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both towers' rows ([num_text, d_text], [num_image, d_image]) through all layers and their final norms.

        kv_caches: with a cached layout, keys and values of each layer, written in place.
        """
        self._check_layout(layout)
        rope = self.text.rope(layout.position)
        rows, dtype = (x_text, x_image), x_text.dtype
        for i, layer in enumerate(self.text.layers):
            image_layer = self.image.layers[i] if len(self.image.layers) else None
            kv_cache = None if kv_caches is None else kv_caches[i]
            rows = layer(rows, layout, rope, image_layer, kv_cache, self.recompute)
        norms = (self.text.norm.weight.to(dtype), self.image.norm.weight.to(dtype))
        h = lk.routed_rms_norm(rows, *norms, layout, self.config.text_config.rms_norm_eps)
        return cast(tuple[Tensor, Tensor], h)

    def _check_device(self, device: torch.device, what: str) -> None:
        if device != self.text.norm.weight.device:
            raise ValueError(
                f"the model is on {self.text.norm.weight.device}, but {what} on {device}; move one of them"
            )

    def _check_layout(self, layout: lk.TokenLayout) -> None:
        if layout.num_constant and not self.frozen_text and torch.is_grad_enabled():
            raise ValueError(
                "the batch was packed for a frozen text tower, but this model's is trainable; pack with "
                "frozen_text=False, or call model.freeze_text()"
            )
        window = sliding_window(self.config.text_config)
        if window is not None and layout.longest_document > window:
            raise ValueError(
                f"a document has {layout.longest_document} tokens, but the base LLM attends in a sliding window of "
                f"{window}, which is supported only as far as documents fit in it; shorten the documents"
            )

    def text_logits(self, h_text: Tensor) -> Tensor:
        """Logits [n, V + 2] of text rows after `run_layers`: the vocabulary's, then BOI's and EOI's."""
        markers = F.linear(h_text, self.image.marker_head.to(h_text.dtype))
        return torch.cat([self._vocabulary_logits(h_text), markers], dim=-1)

    def _vocabulary_logits(self, h_text: Tensor) -> Tensor:
        return F.linear(h_text, self.text.head_weight.to(h_text.dtype))

    @property
    def _dtype(self) -> torch.dtype:
        return self.compute_dtype or self.text.embed_tokens.weight.dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        batch: Batch | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> LMFusionOutput:
        """Logits of text alone, or the losses of a batch of text and images.

        input_ids: integer [B, T], rows of equal length, each a document of its own. The logits are the base LLM's; no
        weight of the image side takes part. batch: see `lmfusion.model.batch.pack`.
        pixel_values, image_sizes: of a vision-language model, images that it sees where input_ids hold its image token,
        as transformers' processor gives all three; the logits are the base VLM's.

        Raises ValueError unless exactly one of input_ids and batch is given, for ids outside the vocabulary, for image
        tokens that are not as many as the images' rows, and for a batch that does not fit the model.
        """
        if (input_ids is None) == (batch is None):
            raise ValueError("give either input_ids (text alone) or batch (text and images)")
        if input_ids is None and pixel_values is not None:
            raise ValueError("pixel_values go with input_ids; a batch has its images inside")
        if batch is not None:
            return self._score(batch)
        assert input_ids is not None
        if pixel_values is None:
            return LMFusionOutput(logits=self._read(input_ids))
        return LMFusionOutput(logits=self._read(*self._seen(input_ids, pixel_values, image_sizes)))

    def _seen(
        self, input_ids: Tensor, pixel_values: Tensor, image_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`input_ids`, which of them stand for rows of images, and these rows [num_vision, d_text]."""
        if self.vision is None:
            raise ValueError("pixel_values are for models made with LMFusion.from_vlm; this one's base sees no images")
        rows = torch.cat(self.vision.encode_pixels(pixel_values, image_sizes))
        is_image = input_ids == self.vision.image_token_id
        if int(is_image.sum()) != rows.shape[0]:
            raise ValueError(
                f"input_ids hold {int(is_image.sum())} image tokens, but the images have {rows.shape[0]} rows; take "
                "input_ids, pixel_values and image_sizes from one call of the processor"
            )
        return input_ids, is_image, rows

    def _read(self, input_ids: Tensor, is_image: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        vocab_size = self.boi_token_id
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}; they are integers [B, T]"
            )
        self._check_device(input_ids.device, "input_ids")
        num_rows, length = input_ids.shape
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
            raise ValueError(f"input_ids hold an id outside the vocabulary of {vocab_size}; images are given by batch=")
        documents = [[("text", length)]] * num_rows if length else []
        layout = lk.TokenLayout.from_spans(documents, frozen_text=self.frozen_text, device=input_ids.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_text):
            x_text = F.embedding(input_ids.flatten(), self.text.embedding_weight)
            if is_image is not None and seen is not None:
                x_text = x_text.masked_scatter(is_image.flatten()[:, None], seen.to(x_text.dtype))
            x_text = x_text.to(self._dtype)
            h_text, _ = self.run_layers(x_text, x_text.new_zeros(0, self.config.image_hidden_size), layout)
            return self._vocabulary_logits(h_text).unflatten(0, (num_rows, length))

    def _score(self, batch: Batch) -> LMFusionOutput:
        self._check_device(batch.layout.device, "the batch")
        layout = batch.layout
        latents, noise, timesteps = batch.latents, batch.noise, batch.timesteps
        noisy = self.diffusion.add_noise(latents, noise, timesteps)
        if batch.num_target_images < batch.num_images:
            noisy = latents.index_copy(0, batch.drawn, noisy.index_select(0, batch.drawn))
        x_image, skip = self.encode_images(noisy, timesteps)
        h_text, h_image = self.run_layers(self.embed(batch.token_ids, batch.vision_embeds), x_image, layout)

        lm_loss_sum = diffusion_loss_sum = begin_loss_sum = self._zero(batch, h_text)
        if batch.num_boi_targets:
            begin_loss_sum = begin_loss_sum + self._begin_loss_sum(h_text.detach()[batch.boi_target_indices], batch)
        if batch.num_labels:
            is_labelled = batch.labels != IGNORED
            h_live, labels = h_text[layout.num_constant :], batch.labels
            if h_live.device.type == "cpu":  # elsewhere choosing rows would wait for the device
                h_live, labels = h_live[is_labelled], labels[is_labelled]
            logits = self.text_logits(h_live).float()
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            lm_loss_sum = lm_loss_sum + losses
        if batch.num_target_images:
            assert skip is not None
            if batch.num_target_images < batch.num_images:
                h_image = h_image.unflatten(0, (batch.num_images, -1)).index_select(0, batch.drawn).flatten(0, 1)
                skip = tuple(feature.index_select(0, batch.drawn) for feature in skip)
                latents, noise, timesteps = (x.index_select(0, batch.drawn) for x in (latents, noise, timesteps))
            prediction = self.decode_images(h_image, timesteps, skip)
            target = self.diffusion.target(latents, noise, timesteps)
            diffusion_loss_sum = diffusion_loss_sum + self.diffusion.loss(prediction, target).sum()
        loss = lm_loss_sum / max(1, batch.num_labels) + begin_loss_sum / max(1, batch.num_boi_targets)
        loss = loss + self.config.diffusion.loss_weight * diffusion_loss_sum / max(1, batch.num_target_images)
        return LMFusionOutput(
            loss=loss,
            lm_loss_sum=lm_loss_sum,
            num_labels=batch.num_labels,
            begin_loss_sum=begin_loss_sum,
            num_boi_targets=batch.num_boi_targets,
            diffusion_loss_sum=diffusion_loss_sum,
            num_target_images=batch.num_target_images,
        )

    def _begin_loss_sum(self, h: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of "BOI" against "any word of the LLM's" for constant rows h [num_boi_targets, d_text].

        The gradient of the marker rows is that of a cross-entropy over all V + 2 logits; the LLM's own surprise at its
        text, which nothing can change, is left out of the sum.
        """
        wide = torch.promote_types(h.dtype, torch.float32)
        with torch.no_grad():  # a few rows at a time: all logits of a large vocabulary would not fit
            chunks = h.split(max(1, MAX_LOGITS // self.boi_token_id))
            vocabulary = torch.cat([self._vocabulary_logits(rows).to(wide).logsumexp(dim=-1) for rows in chunks])
        markers = F.linear(h, self.image.marker_head.to(h.dtype)).to(wide)
        total = torch.logaddexp(vocabulary, markers.logsumexp(dim=-1))
        return (total - torch.where(batch.boi_labels, markers[:, 0], vocabulary)).sum()

    def _zero(self, batch: Batch, h_text: Tensor) -> Tensor:
        """A zero that depends on every weight that the losses of `batch` do not depend on.

        So every batch gives every trained weight a gradient, be it of zeros: ranks that train together add up the same
        gradients in the same order, whatever their batches hold.
        """
        unused: list[Tensor] = [self.image.marker_embedding]
        if not batch.num_labels:
            unused.append(self.text.head_weight)
        if not batch.num_labels and not batch.num_boi_targets:
            unused.append(self.image.marker_head)
        if not batch.num_target_images:
            unused += self.image.patch_coder.parameters()
        if not batch.num_labels and not batch.num_target_images:
            unused.append(h_text)
        return 0.0 * torch.stack([tensor.flatten()[:1].float().sum() for tensor in unused]).sum()


AutoModel.register(LMFusionConfig, LMFusion)
