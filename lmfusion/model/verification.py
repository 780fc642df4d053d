"""Verifies that the frozen part of a model is the base, bit for bit: digests of tensors, and logits of fixed prompts.

For a vision-language base this includes the vision encoder and projector, and the logits of a prompt with an image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.initialization import no_init_weights
from transformers.utils import logging

from lmfusion.conversion import EMBEDDING_NAME, BaseModel, load_base, names
from lmfusion.conversion.huggingface import CONFIG_NAME, build_config, read_settings
from lmfusion.model.assembly import base_tensors
from lmfusion.model.modeling import LMFusion
from lmfusion.model.records import changed_digests, tensor_digests
from lmfusion.model.saved_files import saved_parts

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little robot who wanted to paint.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
)
IMAGE_PROMPT = "What is in this image?"
IMAGE_SIZE = (480, 320)
"""Width and height of the image in that prompt."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far logits may be from transformers', whose kernels round differently. In other dtypes: twice the distance of
transformers' own logits in that dtype from its float32 logits."""


@dataclass
class PromptCheck:
    """Logits of one prompt."""

    prompt: str
    num_tokens: int
    identical: bool
    """Whether they are, bit for bit, those of the base LLM computed by the same code."""
    max_difference: float
    """Largest absolute difference from the logits of transformers' own implementation of the base LLM, in float32 or
    wider."""
    tolerance: float
    """Upper limit for `max_difference`."""


@dataclass
class Verification:
    """The result of `verify`."""

    base: str
    """Where the base LLM was read from."""
    num_tensors: int
    changed: list[str]
    """Tensors whose sha256 is not the base's, named as in `BaseRecord.sha256`."""
    prompts: list[PromptCheck]

    @property
    def text_identical(self) -> bool:
        """Whether all tensors and logits are the base LLM's, and the base's logits agree with transformers."""
        agree = all(check.identical and check.max_difference <= check.tolerance for check in self.prompts)
        return not self.changed and agree

    def table(self) -> str:
        """The result as a text table."""
        num_same = self.num_tensors - len(self.changed)
        lines = [
            f"base          {self.base}",
            f"tensors       {num_same} of {self.num_tensors} have the base's sha256",
            *(f"              changed: {name}" for name in self.changed[:10]),
            *([f"              and {len(self.changed) - 10} more"] if len(self.changed) > 10 else []),
            "",
            f"{'logits of':40} {'tokens':>6}  {'bits':9}  largest difference from transformers",
        ]
        for check in self.prompts:
            verdict = "identical" if check.identical else "CHANGED"
            lines.append(
                f"{_shorten(check.prompt):40} {check.num_tokens:>6}  {verdict:9}  "
                f"{check.max_difference:.2g} (up to {check.tolerance:.2g})"
            )
        lines += ["", "text identical: " + ("yes" if self.text_identical else "NO")]
        return "\n".join(lines)


def verify(
    model: LMFusion | str | Path, base: str | Path | None = None, codec_path: str | Path | None = None
) -> Verification:
    """Compare the frozen part of `model` (or of the model saved at that path) with its base, an LLM or a VLM.

    base: the base's path; None: the path that the model was made from. codec_path: the path of a saved model's
    autoencoder, if it has moved. Raises FileNotFoundError where one of them is missing.
    """
    if not isinstance(model, LMFusion):
        needs_base = saved_parts(model) == "image"  # a model saved whole can be compared with any base
        model = LMFusion.from_pretrained(model, base=base if needs_base else None, codec_path=codec_path)
    if model.base is None:
        raise ValueError("this model was made without a base LLM, so there is nothing to compare it with")
    found = load_base(model.base.name if base is None else base, model.base.torch_dtype)
    frozen = base_tensors(model)
    dtype = frozen[EMBEDDING_NAME].dtype
    tensors = {name: tensor.to(dtype) for name, tensor in found.tensors.items()}
    changed = changed_digests(tensor_digests(tensors), tensor_digests(frozen))

    base_model = replace(found, tensors=tensors, read_tokenizer=lambda: None)
    inputs = [{"input_ids": _encode(model, prompt)} for prompt in PROMPTS]
    prompts = list(PROMPTS)
    if model.vision is not None:
        prompts.append(f"<image> {IMAGE_PROMPT}")
        inputs.append(_with_image(model))
    references = _reference_logits(base_model, inputs, model.compute_dtype or dtype)
    config = model.config
    original = LMFusion.from_base(base_model, config.image, config.codec, config.diffusion)  # empties `tensors`
    original.to(model.device)  # type: ignore[arg-type]
    original.compute_dtype = model.compute_dtype
    checks = []
    for prompt, arguments, (reference, tolerance) in zip(prompts, inputs, references, strict=True):
        on_device = {name: tensor.to(model.device) for name, tensor in arguments.items()}
        with torch.inference_mode():
            ours, expected = (m(**on_device).logits for m in (model, original))
        difference = float((expected.to("cpu", reference.dtype) - reference).abs().max())
        num_tokens = arguments["input_ids"].shape[1]
        checks.append(PromptCheck(prompt, num_tokens, torch.equal(ours, expected), difference, tolerance))
    return Verification(found.name, len(frozen), changed, checks)


@torch.inference_mode()
def _reference_logits(
    base: BaseModel, inputs: list[dict[str, Tensor]], dtype: torch.dtype
) -> list[tuple[Tensor, float]]:
    """transformers' logits [1, T, V] for each of `inputs`, and how far other logits in `dtype` may be from them."""
    wide = torch.promote_types(dtype, torch.float32)
    theirs = _reference_model(base, wide).eval()

    def logits(of_dtype: torch.dtype) -> list[Tensor]:
        return [theirs(**_in_dtype(arguments, of_dtype)).logits.to(wide) for arguments in inputs]

    references = logits(wide)
    if dtype in TOLERANCE:
        return [(reference, TOLERANCE[dtype]) for reference in references]
    theirs.to(dtype)
    rounded = logits(dtype)
    return [(x, 2 * float((x - y).abs().max())) for x, y in zip(references, rounded, strict=True)]


def _reference_model(base: BaseModel, dtype: torch.dtype) -> Any:
    """The base in transformers' own class, in `dtype`. transformers reads folders itself; GGUF files are read by us."""
    if base.location is not None and base.location.is_dir():
        kind: Any = AutoModelForCausalLM if base.vlm_config is None else AutoModelForImageTextToText
        path = base.location / CONFIG_NAME
        with _without_progress():
            model, report = kind.from_pretrained(
                base.location,
                config=build_config(read_settings(path), path),
                dtype=base.tensors[EMBEDDING_NAME].dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError(f"transformers does not find all weights in {base.location}: {report}")
        return model.to(dtype)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(base.config)
    model = model.to(dtype)
    model.load_state_dict({names.to_llama(name): tensor for name, tensor in base.tensors.items()}, strict=False)
    model.tie_weights()
    return model


@contextmanager
def _without_progress() -> Iterator[None]:
    """Hides transformers' progress bars."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _encode(model: LMFusion, prompt: str) -> Tensor:
    """Token ids [1, T] of a prompt; without a tokenizer, its bytes modulo the size of the vocabulary."""
    if model.tokenizer is None:
        return torch.tensor([[byte % model.boi_token_id for byte in prompt.encode()]])
    return model.tokenizer(prompt, return_tensors="pt")["input_ids"]


def _with_image(model: LMFusion) -> dict[str, Tensor]:
    """The inputs that transformers' processor would give for a text and an image with a fixed pattern."""
    assert model.vision is not None
    x, y = np.meshgrid(*(np.arange(size) for size in IMAGE_SIZE))
    pattern = np.stack([x % 256, y % 256, (x ^ y) % 256], axis=-1).astype(np.uint8)
    image = model.vision.prepare(Image.fromarray(pattern))
    image_ids = torch.full((1, image.num_tokens), model.vision.image_token_id)
    ids = torch.cat([image_ids, _encode(model, IMAGE_PROMPT)], dim=1)
    pixel_values = image.pixel_values[None] if model.vision.has_tiles else image.pixel_values
    arguments = {"input_ids": ids, "pixel_values": pixel_values}
    if model.vision.has_tiles:
        arguments["image_sizes"] = torch.tensor([[image.height, image.width]])
    return arguments


def _in_dtype(arguments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}


def _shorten(prompt: str) -> str:
    line = prompt.replace("\n", " ")
    return line if len(line) <= 40 else line[:37] + "..."
