"""`LMFusion`: two towers around shared attention, from text and images to losses, logits and predictions.

Importing this module registers the model with transformers' AutoConfig and AutoModel.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel

import lmfusion_kernels as lk
from lmfusion.conversion import BaseModel, load_base
from lmfusion.conversion.architectures import check_supported
from lmfusion.conversion.model_limits import sliding_window
from lmfusion.images.preprocessing import ImageSource
from lmfusion.model import saving
from lmfusion.model.assembly import FROZEN_PREFIXES, assemble, summarize, to_data
from lmfusion.model.batch import IGNORED, Batch
from lmfusion.model.codec import Codec, CodecConfig, load_codec
from lmfusion.model.configuration import ImageTowerConfig, LMFusionConfig
from lmfusion.model.diffusion import Diffusion, DiffusionConfig
from lmfusion.model.losses import LMFusionOutput, boi_loss_sum, total_loss
from lmfusion.model.patch_coder import Skip
from lmfusion.model.pretrained import LoadingOptions, PreTrainedMethods
from lmfusion.model.records import BaseRecord, tensor_digests
from lmfusion.model.towers import ImageTower, TextTower
from lmfusion.model.vision import VisionEncoder
from lmfusion.utils.files import full_path

if TYPE_CHECKING:
    from lmfusion.generation import Answer, Event, PromptLike

KeyValueCaches = Sequence[tuple[Tensor, Tensor]]
"""One pair per layer: keys and values [num_slots, H_kv, D] of a cached layout."""


class LMFusion(PreTrainedMethods):
    """A text LLM and an image tower beside it. Make one with `from_llm`, load one with `from_pretrained`.

    Its attributes (text, image, vision, codec, tokenizer, base, trained) are described in `PreTrainedMethods`.
    """

    config_class = LMFusionConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: LMFusionConfig, codec: Codec | None = None) -> None:
        """A model with random weights. codec: one that is already loaded; None loads the one `config` names."""
        super().__init__(config)
        check_supported(config.text_config, "text_config")
        with torch.device("cpu"):  # these hold real tensors even while the towers are built on the meta device
            self.codec = load_codec(config.codec) if codec is None else codec
            self.diffusion = Diffusion(config.diffusion)
            self.vision = None if config.vlm_config is None else VisionEncoder(config.vlm_config)
        self.text = TextTower(config.text_config)
        self.image = ImageTower(config, self.codec.latent_channels)
        self.tokenizer = self.base = self.trained = None
        self.compute_dtype: torch.dtype | None = None
        """dtype of the hidden states; None: that of the text weights. Weights in another dtype are cast when used."""
        self.recompute = "none"
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

        path: a Hugging Face folder, a GGUF file, or a name on the hub. image, codec, diffusion: configurations or
        dicts of their fields; None for the defaults. dtype: of the weights; None keeps the checkpoint's (float32 for
        GGUF). seed: of the weights that start at random.

        Raises FileNotFoundError and ValueError as `lmfusion.conversion.load_base` and the configurations do.
        """
        return cls.from_base(load_base(path, dtype, is_vlm=False), image, codec, diffusion, seed)

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

        Its vision encoder, projector and LLM are frozen; the image tower is added beside the LLM's layers as in
        `from_llm`. Input images go through the model's own encoder and become vision tokens of the text tower; images
        to generate are the image tower's. path: a Hugging Face folder, or a name on the hub. The other parameters, and
        errors, are those of `from_llm`.
        """
        return cls.from_base(load_base(path, dtype, is_vlm=True), image, codec, diffusion, seed)

    @classmethod
    def from_base(
        cls,
        base: BaseModel,
        image: ImageTowerConfig | dict[str, Any] | None = None,
        codec: CodecConfig | dict[str, Any] | None = None,
        diffusion: DiffusionConfig | dict[str, Any] | None = None,
        seed: int = 0,
    ) -> "LMFusion":
        """A model around a base that has been read, as `from_llm` and `from_vlm` make it. Empties `base.tensors`."""
        config = LMFusionConfig(base.config, image, codec, diffusion, vlm_config=base.vlm_config)
        if config.codec.path is not None:
            config.codec = replace(config.codec, path=str(full_path(config.codec.path)))
        sha256 = tensor_digests(base.tensors)
        data = saving.ModelData(config, base.tensors, base.read_tokenizer(), base.read_image_processor())
        model = assemble(cls, data, base.name, new_image_seed=seed)
        model.base = BaseRecord(base.name, str(model.dtype).removeprefix("torch."), sha256)
        return model

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

        base: where its base LLM is now, if it has moved. It must be the same LLM: every tensor's sha256 is compared.
        codec_path: where the folder of its autoencoder is now, if it has moved; the sha256 of its weights is compared.
        Both paths are kept when the model is saved again. dtype: of the weights; None keeps them as they
        were saved. kwargs: those of transformers that apply here, see `LoadingOptions`; device_map names the
        one device to load the model onto.

        Raises FileNotFoundError when a file or the base is missing, ValueError when one is damaged or differs.
        """
        options = LoadingOptions.parse(dtype, kwargs)
        data = saving.load(Path(path), base, codec_path)
        model = assemble(cls, data, str(full_path(path)))
        model.name_or_path = model.config.name_or_path = str(full_path(path))
        if options.dtype is not None:
            for part in (model.text, model.image, model.vision):
                if part is not None:
                    part.to(options.dtype)
        if options.adapter is not None:
            model.load_adapter(options.adapter)
        return model if options.device is None else model.to(options.device)  # type: ignore[arg-type]

    def save_pretrained(self, path: str | Path, parts: str = "image") -> None:  # type: ignore[override]
        """Save into the folder `path`: config.json, base.json, safetensors, tokenizer and a model card.

        parts: "image" (everything that was trained; base LLM and autoencoder are loaded from where they are, and
        checked) or "all". An autoencoder inside `path` itself stays there.

        A model already saved there is kept until the new one is complete, and so are edits to its model card.

        Raises ValueError for a folder that holds something else, for a model with peft's adapters on it, or for
        parts="image" after training the text tower or where the base LLM is gone; OSError when writing fails.
        """
        saving.check_parts(parts, self.base)
        prefixes = ("image.", *FROZEN_PREFIXES) if parts == "all" else ("image.",)
        saving.save(to_data(self, *prefixes), summarize(self), Path(path), parts)

    def save_text(self, path: str | Path) -> None:
        """Save the text tower alone as the LLM it is, for transformers' AutoModelForCausalLM and others.

        path: a folder that does not exist or is empty. Raises ValueError for another, OSError when writing fails.
        """
        saving.save_text(to_data(self, "text."), Path(path))

    # Generation is built on this module, so the four methods below import it when they are called. They are the only
    # place where a lower layer of the package imports a higher one.

    def stream(self, prompt: "PromptLike", chat: bool = False, **options: Any) -> "Iterator[Event]":
        """Events of one answer as they happen: text, previews and images, the end.

        See `lmfusion.generation.stream_answer`; options: the fields of `GenerationOptions`.
        """
        from lmfusion import generation

        return generation.stream_answer(self, prompt, chat=chat, **options)

    def generate(
        self, prompts: "Sequence[PromptLike]", chat: bool = False, batch_size: int = 8, **options: Any
    ) -> "list[Answer]":
        """An answer to each prompt: text, and images where max_images allows them.

        See `lmfusion.generation.generate_answers`; options: the fields of `GenerationOptions`.
        """
        from lmfusion import generation

        return generation.generate_answers(self, prompts, chat=chat, batch_size=batch_size, **options)

    def draw(self, prompts: "Sequence[PromptLike]", **options: Any) -> list[Image]:
        """An image for each prompt; `options` are those of `lmfusion.generation.draw_images`."""
        from lmfusion import generation

        return generation.draw_images(self, prompts, **options)

    def caption(self, images: Sequence[ImageSource], **options: Any) -> list[str]:
        """A caption of each image; `options` are those of `lmfusion.generation.caption_images`."""
        from lmfusion import generation

        return generation.caption_images(self, images, **options)

    def embed(self, token_ids: Tensor, vision_embeds: Tensor | None = None) -> Tensor:
        """Embeddings [n, d_text] of token ids (integer [n]), which may include BOI and EOI.

        vision_embeds: [num_vision, d_text], embeddings of the vision tokens; the id -1 - k refers to number k.
        """
        # Every id is looked up in every table and the right result chosen, so that nothing waits for the device
        vocab_size = self.boi_token_id
        is_marker = token_ids >= vocab_size
        x = F.embedding(token_ids.clamp(0, vocab_size - 1), self.text.embedding_weight)
        markers = F.embedding((token_ids - vocab_size).clamp(min=0), self.image.marker_embedding)
        x = torch.where(is_marker[:, None], markers.to(x.dtype), x)
        if vision_embeds is not None and vision_embeds.shape[0]:
            vision = vision_embeds.to(x.dtype).index_select(0, (-1 - token_ids).clamp(min=0))
            x = torch.where((token_ids < 0)[:, None], vision, x)
        return x.to(self._dtype)

    def encode_images(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Skip | None]:
        """Image tokens [B * L, d_image] of (noisy) latents [B, C, h, w] at `timesteps` int64 [B], and the skip."""
        if latents.shape[0] == 0:
            return latents.new_zeros(0, self.config.image_hidden_size, dtype=self._dtype), None
        x_image, skip = self.image.patch_coder.encode(latents, timesteps)
        return x_image.to(self._dtype), skip

    def decode_images(self, h_image: Tensor, timesteps: Tensor, skip: Skip | None) -> Tensor:
        """Predictions [B, C, h, w] of the diffusion from the image tokens after `run_layers`."""
        if skip is None:
            return h_image.new_zeros(0, self.codec.latent_channels, self.codec.latent_size, self.codec.latent_size)
        return self.image.patch_coder.decode(h_image, timesteps, skip)

    def run_layers(
        self, x_text: Tensor, x_image: Tensor, layout: lk.TokenLayout, kv_caches: KeyValueCaches | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both towers' tokens ([num_text, d_text], [num_image, d_image]) after all layers and the final norms.

        kv_caches: with a cached layout, keys and values of each layer, updated in place.
        """
        self._check_layout(layout)
        rope = self.text.rope(layout.position)
        x, dtype = (x_text, x_image), x_text.dtype
        for i, layer in enumerate(self.text.layers):
            image_layer = self.image.layers[i] if len(self.image.layers) else None
            kv_cache = None if kv_caches is None else kv_caches[i]
            x = layer(x, layout, rope, image_layer, kv_cache, self.recompute)
        norms = (self.text.norm.weight.to(dtype), self.image.norm.weight.to(dtype))
        h = lk.routed_rms_norm(x, *norms, layout, self.config.text_config.rms_norm_eps)
        return cast(tuple[Tensor, Tensor], h)

    def _check_device(self, device: torch.device, what: str) -> None:
        if device != self.text.norm.weight.device:
            raise ValueError(
                f"{what} must be on the model's device, {self.text.norm.weight.device}, got {device}; move one of them"
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
                f"documents must fit into the base LLM's sliding window of {window} tokens, got one of "
                f"{layout.longest_document}; shorten the documents"
            )

    def text_logits(self, h_text: Tensor) -> Tensor:
        """Logits [n, V + 2] of text tokens after `run_layers`: the vocabulary's, then BOI's and EOI's."""
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

        input_ids: integer [B, T], B documents of equal length. The logits are the base LLM's; no weight of the image
        side is used. batch: see `lmfusion.model.batch.pack`.
        pixel_values, image_sizes: with a vision-language base, the images whose vision tokens replace the image tokens
        in input_ids; all three come from transformers' processor. The logits are the base VLM's.

        Raises ValueError unless exactly one of input_ids and batch is given, for ids outside the vocabulary, for
        another number of image tokens than the images have, and for a batch that does not fit the model.
        """
        if (input_ids is None) == (batch is None):
            raise ValueError("give either input_ids (text alone) or batch (text and images)")
        if input_ids is None and pixel_values is not None:
            raise ValueError("pixel_values must come with input_ids; a batch holds its images itself")
        if batch is not None:
            return self._score(batch)
        assert input_ids is not None
        if pixel_values is None:
            return LMFusionOutput(logits=self._read(input_ids))
        return LMFusionOutput(logits=self._read(*self._vision_tokens(input_ids, pixel_values, image_sizes)))

    def _vision_tokens(
        self, input_ids: Tensor, pixel_values: Tensor, image_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`input_ids`, which of them are image tokens, and the embeddings [num_vision, d_text] that replace them."""
        if self.vision is None:
            raise ValueError("pixel_values need a model made with LMFusion.from_vlm; this one's base is an LLM")
        embeddings = torch.cat(self.vision.encode_pixels(pixel_values, image_sizes))
        is_image = input_ids == self.vision.image_token_id
        if int(is_image.sum()) != embeddings.shape[0]:
            raise ValueError(
                f"input_ids must hold the {embeddings.shape[0]} image tokens of the images, got {int(is_image.sum())}; "
                "take input_ids, pixel_values and image_sizes from one call of the processor"
            )
        return input_ids, is_image, embeddings

    def _read(self, input_ids: Tensor, is_image: Tensor | None = None, vision: Tensor | None = None) -> Tensor:
        vocab_size = self.boi_token_id
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be integers [B, T], got {input_ids.dtype} of shape {tuple(input_ids.shape)}"
            )
        self._check_device(input_ids.device, "input_ids")
        num_documents, length = input_ids.shape
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
            raise ValueError(
                f"input_ids must be from 0 to {vocab_size - 1}, got {int(input_ids.min())} to {int(input_ids.max())}; "
                "images are given by batch="
            )
        documents = [[("text", length)]] * num_documents if length else []
        layout = lk.TokenLayout.from_spans(documents, frozen_text=self.frozen_text, device=input_ids.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_text):
            x_text = F.embedding(input_ids.flatten(), self.text.embedding_weight)
            if is_image is not None and vision is not None:
                x_text = x_text.masked_scatter(is_image.flatten()[:, None], vision.to(x_text.dtype))
            x_text = x_text.to(self._dtype)
            h_text, _ = self.run_layers(x_text, x_text.new_zeros(0, self.config.image_hidden_size), layout)
            return self._vocabulary_logits(h_text).unflatten(0, (num_documents, length))

    def _score(self, batch: Batch) -> LMFusionOutput:
        self._check_device(batch.layout.device, "the batch")
        layout = batch.layout
        latents, noise, timesteps = batch.latents, batch.noise, batch.timesteps
        noisy = self.diffusion.add_noise(latents, noise, timesteps)
        targets = batch.target_image_indices
        if batch.num_target_images < batch.num_images:  # input images stay without noise
            noisy = latents.index_copy(0, targets, noisy.index_select(0, targets))
        x_image, skip = self.encode_images(noisy, timesteps)
        h_text, h_image = self.run_layers(self.embed(batch.token_ids, batch.vision_embeds), x_image, layout)

        lm_loss_sum = diffusion_loss_sum = boi_sum = self._zero(batch, h_text)
        if batch.num_boi_targets:
            # Nothing before these tokens can be trained, so the gradient stops at their hidden states
            h = h_text.detach()[batch.boi_target_indices]
            boi_sum = boi_sum + boi_loss_sum(h, self.text.head_weight, self.image.marker_head, batch.boi_labels)
        if batch.num_labels:
            is_labelled = batch.labels != IGNORED
            h_live, labels = h_text[layout.num_constant :], batch.labels
            if h_live.device.type == "cpu":  # on a GPU, selecting by a mask would wait for the device
                h_live, labels = h_live[is_labelled], labels[is_labelled]
            logits = self.text_logits(h_live).float()
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            lm_loss_sum = lm_loss_sum + losses
        if batch.num_target_images:
            assert skip is not None
            if batch.num_target_images < batch.num_images:
                h_image = h_image.unflatten(0, (batch.num_images, -1)).index_select(0, targets).flatten(0, 1)
                skip = tuple(feature.index_select(0, targets) for feature in skip)
                latents, noise, timesteps = (x.index_select(0, targets) for x in (latents, noise, timesteps))
            prediction = self.decode_images(h_image, timesteps, skip)
            target = self.diffusion.target(latents, noise, timesteps)
            diffusion_loss_sum = diffusion_loss_sum + self.diffusion.loss(prediction, target).sum()
        return total_loss(batch, lm_loss_sum, boi_sum, diffusion_loss_sum, self.config.diffusion.loss_weight)

    def _zero(self, batch: Batch, h_text: Tensor) -> Tensor:
        """A zero that depends on every weight that the losses of `batch` do not depend on.

        So every batch gives every trained weight a gradient, even if it is zero: ranks that train together must reduce
        the same gradients in the same order, whatever their batches contain.
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


AutoConfig.register(LMFusionConfig.model_type, LMFusionConfig)
AutoModel.register(LMFusionConfig, LMFusion)
