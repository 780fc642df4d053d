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
"""How far logits may be from transformers', whose kernels round differently. In other dtypes: twice as far from its
float32 logits as its own of that dtype are."""


@dataclass
class PromptCheck:
    """Logits of one prompt."""

    prompt: str
    num_tokens: int
    identical: bool
    """Bit for bit those of the base LLM run through the same code."""
    max_difference: float
    """Largest absolute difference from the logits of transformers' own implementation of the base LLM, in float32 or
    wider."""
    tolerance: float
    """How large it may be."""


@dataclass
class Verification:
    """What `verify` found."""

    base: str
    """Where the base LLM was read from."""
    num_tensors: int
    changed: list[str]
    """Text tensors whose sha256 is not the base's, by the name a Llama checkpoint gives them."""
    prompts: list[PromptCheck]

    @property
    def text_identical(self) -> bool:
        """Whether every tensor and every logit is the base LLM's, and the base's logits agree with transformers."""
        agree = all(check.identical and check.max_difference <= check.tolerance for check in self.prompts)
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

    base_model = BaseModel(found.name, found.config, tensors, read_tokenizer=lambda: None)
    input_ids = [_encode(model, prompt) for prompt in PROMPTS]
    references = _reference_logits(base_model, input_ids, model.compute_dtype or dtype)
    config = model.config
    original = from_base(LMFusion, base_model, config.image, config.codec, config.diffusion)  # takes the tensors over
    original.to(model.device)  # type: ignore[arg-type]
    original.compute_dtype = model.compute_dtype
    checks = []
    for prompt, ids, (reference, tolerance) in zip(PROMPTS, input_ids, references, strict=True):
        with torch.inference_mode():
            ours, expected = (m(ids.to(model.device)).logits for m in (model, original))
        difference = float((expected.to("cpu", reference.dtype) - reference).abs().max())
        checks.append(PromptCheck(prompt, ids.shape[1], torch.equal(ours, expected), difference, tolerance))
    return Verification(found.name, len(text), changed, checks)


@torch.inference_mode()
def _reference_logits(base: BaseModel, input_ids: list[Tensor], dtype: torch.dtype) -> list[tuple[Tensor, float]]:
    """transformers' logits [1, T, V] of each of `input_ids`, and how far others in `dtype` may be from them."""
    wide = torch.promote_types(dtype, torch.float32)
    with no_init_weights():
        theirs = AutoModelForCausalLM.from_config(base.config).to(wide).eval()
    theirs.load_state_dict({names.to_llama(name): tensor for name, tensor in base.tensors.items()}, strict=False)
    theirs.tie_weights()
    references = [theirs(ids).logits for ids in input_ids]
    if dtype in TOLERANCE:
        return [(reference, TOLERANCE[dtype]) for reference in references]
    theirs.to(dtype)
    rounded = [theirs(ids).logits.to(wide) for ids in input_ids]
    return [(x, 2 * float((x - y).abs().max())) for x, y in zip(references, rounded, strict=True)]


def _encode(model: LMFusion, prompt: str) -> Tensor:
    """Token ids [1, T] of a prompt; without a tokenizer, its bytes as far as the vocabulary goes."""
    if model.tokenizer is None:
        return torch.tensor([[byte % model.boi_token_id for byte in prompt.encode()]])
    return model.tokenizer(prompt, return_tensors="pt")["input_ids"]


def _shorten(prompt: str) -> str:
    line = prompt.replace("\n", " ")
    return line if len(line) <= 40 else line[:37] + "..."
