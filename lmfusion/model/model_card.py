"""Writes the model card, the README.md of a saved model, from the configuration and the records of base and training.

The text between the two comment lines BEGIN and END is written again at each save. The rest of the file, including the
YAML at its top, is written once; after that, edits to it are kept.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedConfig

from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.records import BaseRecord, TrainingRecord

CARD_NAME = "README.md"
BEGIN = "<!-- lmfusion: saving the model rewrites the text from here to the closing comment; the rest is yours. -->"
END = "<!-- lmfusion: end of the rewritten text. -->"


@dataclass(frozen=True)
class ModelSummary:
    """The figures of a model that its configuration does not hold."""

    num_parameters: dict[str, int]
    """Of its parts: "text", "image", "codec", and "vision" for a vision-language base."""
    tokens_per_image: int


TEMPLATE = """# {base}, with an image tower

{base} is a {kind}. An image tower adds a layer beside each of its layers, so that it {gain}: text is
generated token by token and images by diffusion, with shared attention. Made with
[lmfusion](https://arxiv.org/abs/2412.15188). {text_side}

| | |
| --- | --- |
| base LLM | {base}: {architecture}, {base_dtype}; sha256 over all its tensors: {digest} |
| text tower | {text_parameters} parameters, {num_layers} layers of width {text_width} |{vision}
| image tower | {image_parameters} parameters, width {image_width}, separation {separation}, patch coder {patch_coder} |
| codec | {codec} |
| diffusion | {prediction_type}, {schedule} schedule of {num_train_timesteps} steps |
| images | {image_size} x {image_size} pixels, {colours}; {tokens_per_image} tokens each |
| in this folder | {parts} |

## Use

In this folder, with `lmfusion` installed:

```bash
lmfusion generate . "a caption of the image" --sampler dpm-solver --num-steps 20
lmfusion caption . photo.png
{chat}{verify}```

```python
from lmfusion import LMFusion

model = LMFusion.from_pretrained("."){base_hint}
images = model.draw(["a caption of the image"], sampler="dpm-solver", num_steps=20)
captions = model.caption(images)
```

After `import lmfusion.hub`, `transformers.AutoModel.from_pretrained(".")` gives the same model.

## Training

{training}

## Limits

- Its text comes from the base LLM, with that model's knowledge, errors and biases.
- It generates and describes what its training images show, at their size; other subjects and sizes may give noise.
- Its texts and images are not filtered, and no evaluation is recorded here.
"""

CHAT = 'lmfusion generate . "Draw something, then say what you drew." --chat\n'
VERIFY = "lmfusion verify .    # is the text side still the base LLM, bit for bit?\n"


def model_card(
    config: LMFusionConfig,
    summary: ModelSummary,
    base: BaseRecord | None,
    trained: TrainingRecord | None,
    parts: str,
    previous: str | None = None,
) -> str | None:
    """The text of the card of a model saved with `parts`; None where `previous` is a card without BEGIN and END.

    previous: the file that is there now. Its text outside BEGIN and END is kept.
    """
    body = f"{BEGIN}\n{_body(config, summary, base, trained, parts)}{END}"
    if previous is None:
        return f"---\n{_metadata(base).to_yaml()}\n---\n{body}\n"
    before, begin, rest = previous.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{body}{after}" if begin and end else None


def _metadata(base: BaseRecord | None) -> ModelCardData:
    name = "" if base is None else base.name
    return ModelCardData(
        license=_license(Path(name)) if name else "unknown",
        library_name="lmfusion",
        pipeline_tag="any-to-any",
        base_model=name if _is_on_hub(name) else None,
        tags=["lmfusion", "text-to-image", "image-to-text", "mixture-of-transformers", "diffusion"],
    )


def _is_on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _license(base: Path) -> str:
    """The licence in the base LLM's own card, where its folder has one."""
    try:
        known = ModelCard.load(base / CARD_NAME).data.license if (base / CARD_NAME).is_file() else None
    except (OSError, ValueError, yaml.YAMLError):  # damaged
        known = None
    return known if isinstance(known, str) else "unknown"


def _body(
    config: LMFusionConfig, summary: ModelSummary, base: BaseRecord | None, trained: TrainingRecord | None, parts: str
) -> str:
    counts = {part: _in_words(number) for part, number in summary.num_parameters.items()}
    text, codec = config.text_config, config.codec
    coder = config.image.patch_coder
    base_name = "An LLM without a record" if base is None else Path(base.name).name.removesuffix(".gguf")
    if base is None:
        text_side, digest, verify = "No base LLM is recorded.", "not recorded", ""
    elif base.may_differ:
        text_side, digest, verify = "Its text side has been trained too.", f"`{base.digest}`", VERIFY
    else:
        text_side = "Its text side is the base LLM's, bit for bit."
        if config.vlm_config is not None:
            text_side = "What it reads, sees and writes is the base model's, bit for bit."
        digest, verify = f"`{base.digest}`", VERIFY
    return TEMPLATE.format(
        base=base_name,
        kind="text LLM" if config.vlm_config is None else "vision-language model",
        gain="also generates and reads images" if config.vlm_config is None else "also generates images",
        vision="" if config.vlm_config is None else _vision_row(config.vlm_config, counts["vision"]),
        text_side=text_side,
        architecture=text.model_type,
        base_dtype="" if base is None else base.dtype,
        digest=digest,
        text_parameters=counts["text"],
        num_layers=text.num_hidden_layers,
        text_width=text.hidden_size,
        image_parameters=counts["image"],
        image_width=config.image_hidden_size,
        separation=config.image.separation,
        patch_coder=f"{coder.kind} (patches of {coder.patch_size} x {coder.patch_size})",
        codec="pixels"
        if codec.path is None
        else f"{codec.kind}, {counts['codec']} parameters, sha256 `{codec.sha256}`",
        prediction_type=config.diffusion.prediction_type,
        schedule=config.diffusion.schedule,
        num_train_timesteps=config.diffusion.num_train_timesteps,
        image_size=codec.image_size,
        colours="grey" if codec.channels == 1 else "RGB",
        tokens_per_image=summary.tokens_per_image,
        parts="all parts" if parts == "all" else "the image part; the base LLM is loaded from where it is, and checked",
        chat="" if config.chat_system_prompt is None else CHAT,  # trained on conversations
        verify=verify,
        base_hint="" if parts == "all" else "  # base=FOLDER if the base LLM has moved",
        training=_training(trained),
    )


def _vision_row(config: PreTrainedConfig, num_parameters: str) -> str:
    encoder = config.vision_config
    return (
        f"\n| vision encoder | {num_parameters} parameters with its projector: {config.model_type} with "
        f"{encoder.model_type}, tiles of {encoder.image_size} x {encoder.image_size} pixels; frozen |"
    )


def _training(record: TrainingRecord | None) -> str:
    if record is None:
        return (
            "No training is recorded. As `lmfusion adapt` makes it, the image tower is untrained and generates noise."
        )
    rows = {
        "data": "; ".join(record.sources),
        "samples read": f"{record.num_samples:,}",
        "updates": f"{record.num_steps:,} of {record.batch_tokens:,} tokens",
        "learning rate": f"{record.learning_rate:g}, falling to {record.min_learning_rate:g}; {record.optimizer}",
        "text tower": f"at {record.text_learning_rate_ratio:g} of it" if record.text_learning_rate_ratio else "frozen",
        "computed in": record.dtype,
        "averaged weights": f"yes, decay {record.ema_decay:g}" if record.ema_decay else "no",
        "seed": str(record.seed),
    }
    table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(["By `lmfusion train`. Later changes, such as merged adapters, are not recorded.", "", *table])


def _in_words(number: int) -> str:
    """A number of parameters as in the names of models: "135 M"."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
