"""What does a run consist of? Dataclasses, read from a YAML recipe and `key.sub=value` overrides."""

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lmfusion.data.config import DataConfig, SourceConfig
from lmfusion.generation.samplers import SAMPLERS
from lmfusion.model.codec import CodecConfig
from lmfusion.model.configuration import ImageTowerConfig
from lmfusion.model.diffusion import DiffusionConfig
from lmfusion.text.chat_template import check_template_variables
from lmfusion.utils.config_values import check_least, field_names, from_values, short_repr
from lmfusion.utils.devices import has_fast_bfloat16
from lmfusion.utils.files import name_os_errors
from lmfusion.utils.yaml_files import read_yaml
from lmfusion_kernels.block.routed_block import RECOMPUTE

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16")

T = TypeVar("T")
OPTIMIZERS = ("adamw", "adamw_8bit")


@dataclass
class ModelConfig:
    """Which LLM is adapted, and what is put beside it; or which adapted model is trained further."""

    base: str | None = None
    """Folder or GGUF file of a Llama-type LLM, or folder of a LLaVA-type vision-language model around one.
    `package:name/file` is a file inside an installed Python package. With adapted: where the LLM of that model is now,
    if it has moved."""
    adapted: str | None = None
    """Folder of an LMFusion model (of `lmfusion adapt`, or of an earlier run) to start from. It brings its own image,
    codec and diffusion."""
    codec_path: str | None = None
    """With adapted: where the folder of that model's autoencoder is now, if it has moved."""
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    chat_system_prompt: str | None = None
    """The system's message of chats with the model that bring none of their own: give conversations the same to learn
    from. None: that of the adapted model, or of the chat template."""
    template_variables: dict[str, Any] = field(default_factory=dict)
    """JSON values that the chat template reads by name, such as {enable_thinking: false}: in training, and in chats
    with the model that bring no others. They come over those of the adapted model."""

    def __post_init__(self) -> None:
        if self.base is None and self.adapted is None:
            raise ValueError("give model.base (an LLM) or model.adapted (an LMFusion model)")
        if self.adapted is None and self.codec_path is not None:
            raise ValueError("model.codec_path belongs to model.adapted; give the path of a new model as codec.path")
        check_template_variables(self.template_variables, "model.template_variables")
        if self.adapted is not None and (self.image, self.codec, self.diffusion) != (
            ImageTowerConfig(),
            CodecConfig(),
            DiffusionConfig(),
        ):
            raise ValueError("model.adapted brings its own image, codec and diffusion; leave these out")


@dataclass
class TrainConfig:
    """How long, how fast and where. The optimiser is AdamW; defaults are the paper's."""

    num_steps: int = 250_000
    batch_tokens: int = 2**20
    """Slots a step, over all ranks: so many rows of data.seq_len, padding included. Rows are computed one by one and
    their gradients added, so a larger step takes more time but no more memory."""
    learning_rate: float = 1e-4
    """Of the image tower, after warm-up; from there it falls along a cosine."""
    min_learning_rate: float = 1.5e-5
    """At the last step."""
    warmup_steps: int = 4000
    text_learning_rate_ratio: float = 0.0
    """Learning rate of the text tower over that of the image tower; 0 freezes the text tower, bit for bit."""
    optimizer: str = "adamw"
    """"adamw" keeps its two moments of each weight in float32; "adamw_8bit" in 8 bits (needs torchao), which saves 6
    bytes a weight."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices and convolutions; never on norms, biases and embeddings."""
    max_grad_norm: float = 1.0
    """Gradients of a larger total norm are scaled down to it."""
    ema_decay: float = 0.9999
    """Of the running average of the trained weights, which is what samples and the exported model use. In early steps
    (1 + step) / (10 + step) holds where it is less. 0: no averaging."""
    dtype: str = "float32"
    """"float32" or "bfloat16": of the activations and the frozen weights. Trained weights are always float32. "auto":
    bfloat16 where the device multiplies it faster (GPUs since Ampere, processors with AMX or AVX-512 BF16)."""
    recompute: str = "none"
    """What the backward of a layer computes again instead of keeping it, to the same gradients: "none", "ffn" (gate and
    up: about half of the activations for one GEMM more) or "layer" (all but the layer's input)."""
    compile: bool = False
    """Let torch.compile fuse what lies between the kernels of a layer; the first steps take minutes longer."""
    seed: int = 0
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu" or "cuda"."""
    log_every: int = 10
    """Steps a line of metrics.jsonl. Between lines nothing waits for the GPU."""
    tensorboard: bool = False
    """Write the metrics, losses of validation and samples for TensorBoard too, into <output>/tensorboard."""
    wandb: str | None = None
    """Send them to this project of Weights & Biases too."""
    profile: tuple[int, int] | None = None
    """Record a trace of the steps from the first number to the second, into <output>/profile."""
    peak_tflops: float | None = None
    """What the device can do at best, in 10^12 operations a second: what MFU is a share of. None: it is measured at the
    start, with large matrix products in train.dtype."""

    def __post_init__(self) -> None:
        _check_choice("train.device", self.device, DEVICES)
        if self.dtype == "auto":
            self.dtype = "bfloat16" if has_fast_bfloat16(self.device) else "float32"
        check_least(self, "train", num_steps=1, batch_tokens=1, warmup_steps=0, log_every=1)
        check_least(self, "train", min_learning_rate=0, text_learning_rate_ratio=0, weight_decay=0, seed=0)
        for name in ("learning_rate", "eps", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be a positive number")
        for name, value in (("betas", max(self.betas)), ("betas", min(self.betas)), ("ema_decay", self.ema_decay)):
            if not 0 <= value < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; 0 up to, but not including, 1")
        if self.warmup_steps > self.num_steps:
            raise ValueError(f"train.warmup_steps is {self.warmup_steps}, more than train.num_steps, {self.num_steps}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"train.min_learning_rate is {self.min_learning_rate}, "
                f"more than train.learning_rate, {self.learning_rate}"
            )
        if self.seed >= 2**63:
            raise ValueError(f"train.seed is {self.seed}; it must be less than 2**63")
        if self.peak_tflops is not None and not (math.isfinite(self.peak_tflops) and self.peak_tflops > 0):
            raise ValueError(f"train.peak_tflops is {self.peak_tflops}; it must be a positive number")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"train.profile is {list(self.profile)}; it is a first and a last step, from 1")
        if self.wandb is not None and not self.wandb.strip():
            raise ValueError("train.wandb is empty; give the name of a project, or null")
        _check_choice("train.optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("train.dtype", self.dtype, DTYPES)
        _check_choice("train.recompute", self.recompute, RECOMPUTE)


@dataclass
class SampleConfig:
    """Images drawn while training, to see how it goes."""

    prompts: list[str] = field(default_factory=list)
    """One row of the picture each; none: no pictures."""
    every: int = 1000
    """Steps between pictures."""
    num_images: int = 4
    """Images a prompt, with other seeds."""
    sampler: str = "dpm-solver"
    num_steps: int = 20
    guidance_scale: float = 1.55

    def __post_init__(self) -> None:
        _check_choice("sample.sampler", self.sampler, SAMPLERS)
        check_least(self, "sample", every=1, num_images=1, num_steps=1, guidance_scale=0)
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("sample.prompts holds an empty prompt; write one, or leave it out")


@dataclass
class ValidationConfig:
    """Losses on samples that are not trained on, with the averaged weights and the same noise every time."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Where they come from, as data.sources; none: no validation."""
    every: int = 1000
    """Steps between validations."""
    num_samples: int = 256
    """The same ones every time; a source that holds fewer gives all it has."""

    def __post_init__(self) -> None:
        check_least(self, "validation", every=1, num_samples=1)


@dataclass
class CheckpointConfig:
    """What a run can be resumed from."""

    every: int = 1000
    """Steps between checkpoints. One is also written at the end, and when the run is interrupted."""
    keep_last: int = 2
    """Older ones are deleted, once their successor is complete."""

    def __post_init__(self) -> None:
        check_least(self, "checkpoint", every=1, keep_last=1)


@dataclass
class RunConfig:
    """One training run."""

    output: str
    """Folder of the run: checkpoints, metrics.jsonl, samples, and the trained model. A run resumes from its folder."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        self.output = str(Path(self.output).expanduser())
        if self.train.batch_tokens % self.data.seq_len:
            raise ValueError(
                f"train.batch_tokens is {self.train.batch_tokens}, which is no multiple of data.seq_len, "
                f"{self.data.seq_len}; a step has whole rows"
            )
        reads_images = any(source.kind != "latents" for source in self.data.sources)
        if self.data.sample_latents and self.model.base and reads_images and self.model.codec.kind != "autoencoder_kl":
            raise ValueError(
                f"data.sample_latents is true, but a codec of kind {self.model.codec.kind!r} has no variance to draw "
                "with; set it to false"
            )
        num_timesteps = self.model.diffusion.num_train_timesteps
        if self.sample.num_steps > num_timesteps:
            raise ValueError(f"sample.num_steps is {self.sample.num_steps}; the diffusion has {num_timesteps} steps")

    @property
    def sequences_per_step(self) -> int:
        """Over all ranks."""
        return self.train.batch_tokens // self.data.seq_len


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The training run that a YAML recipe describes; see `read_recipe`."""
    return read_recipe(RunConfig, recipe, overrides)


def read_recipe(cls: type[T], recipe: str | Path, overrides: Iterable[str] = ()) -> T:
    """The dataclass `cls` out of a YAML recipe, changed by overrides like "train.num_steps=100" (values are YAML).

    Raises ValueError, naming the key, for one that does not exist or has a value of the wrong type or out of range.
    """
    path = Path(recipe)
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    try:
        with name_os_errors(path):
            values = read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys; a recipe has {field_names(cls)}")
    for override in overrides:
        _override(values, override)
    return from_values(cls, values)


def resolve_path(path: str) -> str:
    """`path`, or, for `package:name/file`, the file inside the installed package `name`, which is not imported.

    Raises ValueError where the package is not installed or holds no such file.
    """
    if not path.startswith("package:"):
        return path
    package, _, file = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{path}: the package {package} is not installed; pip install {package.replace('_', '-')}")
    for location in spec.submodule_search_locations:
        found = Path(location, file)
        if file and found.exists():
            return str(found)
    raise ValueError(f"{path}: the package {package} has no file {file!r}")


def _override(values: dict[str, Any], override: str) -> None:
    """Change one key of nested `values`, by "key.sub=value". Raises ValueError for what is no such thing."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"{short_repr(override)} is not an override; write key.sub=value")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"{key}: {parent} is a value and has nothing below it")
    try:
        values[last] = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{short_repr(override)}: {error}") from error


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {short_repr(value)}; it must be one of {', '.join(choices)}")
