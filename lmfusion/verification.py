"""Is the text side still the base LLM, bit for bit? Digests of every tensor, and logits on fixed prompts."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from lmfusion.conversion import EMBEDDING_NAME, BaseModel, load_base, names
from lmfusion.modeling import LMFusion
from lmfusion.serialization import differing, digests, from_base, text_tensors

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little robot who wanted to paint.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
)
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far logits may be from transformers', whose kernels round differently; other dtypes: HALF_TOLERANCE."""
HALF_TOLERANCE = 0.5


@dataclass
class PromptCheck:
    """Logits of one prompt."""

    prompt: str
    num_tokens: int
    identical: bool
    """Bit for bit those of the base LLM run through the same code."""
    max_difference: float
    """Largest absolute difference from the logits of transformers' own implementation of the base LLM."""


@dataclass
class Verification:
    """What `verify` found."""

    base: str
    """Where the base LLM was read from."""
    num_tensors: int
    changed: list[str]
    """Text tensors whose sha256 is not the base's, by the name a Llama checkpoint gives them."""
    prompts: list[PromptCheck]
    tolerance: float
    """How far logits may be from transformers'."""

    @property
    def text_identical(self) -> bool:
        """Whether every tensor and every logit is the base LLM's, and the base's logits agree with transformers."""
        agree = all(check.identical and check.max_difference <= self.tolerance for check in self.prompts)
        return not self.changed and agree

    def table(self) -> str:
        """A table for people."""
        num_same = self.num_tensors - len(self.changed)
        lines = [
            f"base LLM      {self.base}",
            f"text tensors  {num_same} of {self.num_tensors} have the base's sha256",
            *(f"              changed: {name}" for name in self.changed[:10]),
            *([f"              and {len(self.changed) - 10} more"] if len(self.changed) > 10 else []),
            "",
            f"{'logits of':40} {'tokens':>6}  {'bits':9}  "
            f"largest difference from transformers (up to {self.tolerance:g})",
        ]
        for check in self.prompts:
            verdict = "identical" if check.identical else "CHANGED"
            lines.append(f"{_shorten(check.prompt):40} {check.num_tokens:>6}  {verdict:9}  {check.max_difference:.2g}")
        lines += ["", "text identical: " + ("yes" if self.text_identical else "NO")]
        return "\n".join(lines)


def verify(model: LMFusion | str | Path, base: str | Path | None = None) -> Verification:
    """Compare the text side of `model` (or of the model saved at that path) with its base LLM.

    base: where the base LLM is; None: where the model was made from. Raises FileNotFoundError when it is not there.
    """
    if not isinstance(model, LMFusion):
        model = LMFusion.from_pretrained(model, base=base)
    if model.base is None:
        raise ValueError("this model was made without a base LLM, so there is nothing to compare it with")
    found = load_base(model.base.name if base is None else base, model.base.torch_dtype)
    text = text_tensors(model)
    dtype = text[EMBEDDING_NAME].dtype
    tensors = {name: tensor.to(dtype) for name, tensor in found.tensors.items()}
    changed = differing(digests(tensors), digests(text))

    with no_init_weights():
        theirs = AutoModelForCausalLM.from_config(found.config).to(dtype).eval()
    theirs.load_state_dict({names.to_llama(name): tensor for name, tensor in tensors.items()}, strict=False)
    theirs.tie_weights()
    base_model = BaseModel(found.name, found.config, tensors, read_tokenizer=lambda: None)
    config = model.config
    original = from_base(LMFusion, base_model, config.image, config.codec, config.diffusion)
    original.to(model.device)  # type: ignore[arg-type]
    original.compute_dtype = model.compute_dtype
    checks = []
    for prompt in PROMPTS:
        input_ids = _encode(model, prompt)
        with torch.inference_mode():
            ours, expected = (m(input_ids.to(model.device)).logits for m in (model, original))
            reference = theirs(input_ids).logits
        difference = float((expected.float().cpu() - reference.float()).abs().max())
        checks.append(PromptCheck(prompt, input_ids.shape[1], torch.equal(ours, expected), difference))
    tolerance = TOLERANCE.get(model.compute_dtype or dtype, HALF_TOLERANCE)
    return Verification(found.name, len(text), changed, checks, tolerance)


def _encode(model: LMFusion, prompt: str) -> Tensor:
    """Token ids [1, T] of a prompt; without a tokenizer, its bytes as far as the vocabulary goes."""
    if model.tokenizer is None:
        return torch.tensor([[byte % model.boi_token_id for byte in prompt.encode()]])
    return model.tokenizer(prompt, return_tensors="pt")["input_ids"]


def _shorten(prompt: str) -> str:
    line = prompt.replace("\n", " ")
    return line if len(line) <= 40 else line[:37] + "..."
