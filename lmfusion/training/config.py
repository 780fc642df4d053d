"""The configuration of a training run: dataclasses, read from a YAML recipe and `key.sub=value` overrides."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmfusion.data.config import DataConfig, SourceConfig
from lmfusion.generation.options import SAMPLERS
from lmfusion.model.codec import CodecConfig
from lmfusion.model.configuration import ImageTowerConfig
from lmfusion.model.diffusion import DiffusionConfig
from lmfusion.text.chat_template import check_template_variables
from lmfusion.utils.config_values import check_least, short_repr
from lmfusion.utils.devices import has_fast_bfloat16
from lmfusion.utils.recipes import read_recipe
from lmfusion_kernels.block.routed_block import RECOMPUTE

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16")

OPTIMIZERS = ("adamw", "adamw_8bit")


@dataclass
class ModelConfig:
    """The LLM to adapt and the image tower to add, or the adapted model to train further."""

    base: str | None = None
    """Folder or GGUF file of a Llama-type LLM, or folder of a LLaVA-type vision-language model around one.
    `package:name/file` is a file inside an installed Python package. With adapted: the new place of that model's LLM,
    if it has moved."""
    adapted: str | None = None
    """Folder of an LMFusion model (of `lmfusion adapt`, or of an earlier run) to start from. It brings its own image,
    codec and diffusion."""
    codec_path: str | None = None
    """With adapted: the new place of that model's autoencoder folder, if it has moved."""
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    chat_system_prompt: str | None = None
    """System message of chats that have none of their own; train on conversations with the same one. None: that of
    the adapted model, or of the chat template."""
    template_variables: dict[str, Any] = field(default_factory=dict)
    """JSON values that the chat template reads by name, such as {enable_thinking: false}: in training, and in chats
    that give no others. They override those of the adapted model."""

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
class OptimizerConfig:
    """What every training run sets: length, AdamW and its schedule, numbers and device. Defaults are LMFusion's."""

    num_steps: int = 250_000
    learning_rate: float = 1e-4
    """After the warm-up; from there it falls along a cosine. The text tower's is text_learning_rate_ratio times it."""
    min_learning_rate: float = 1.5e-5
    """At the last step."""
    warmup_steps: int = 4000
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices and convolutions; never on norms, biases and embeddings."""
    max_grad_norm: float = 1.0
    """Gradients with a larger total norm are scaled down to it."""
    ema_decay: float = 0.9999
    """Decay of the running average of the trained weights, which is what is measured, sampled from and exported. In
    early steps (1 + step) / (10 + step) is used if it is smaller. 0: no averaging."""
    dtype: str = "float32"
    """"float32" or "bfloat16": dtype of the activations. Trained weights are always float32."""
    seed: int = 0
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu" or "cuda"."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        check_choice("train.device", self.device, DEVICES)
        check_choice("train.dtype", self.dtype, DTYPES)
        check_least(self, "train", num_steps=1, warmup_steps=0, log_every=1, seed=0)
        check_least(self, "train", min_learning_rate=0, weight_decay=0)
        for name in ("learning_rate", "eps", "max_grad_norm"):
            check_positive(f"train.{name}", getattr(self, name))
        for name, values in (("betas", self.betas), ("ema_decay", [self.ema_decay])):
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"train.{name} must be at least 0 and less than 1, got {getattr(self, name)}")
        for name, limit in (("warmup_steps", "num_steps"), ("min_learning_rate", "learning_rate")):
            if getattr(self, name) > getattr(self, limit):
                raise ValueError(
                    f"train.{name} must be at most train.{limit}, {getattr(self, limit)}, got {getattr(self, name)}"
                )
        if self.seed >= 2**63:
            raise ValueError(f"train.seed must be less than 2**63, got {self.seed}")


@dataclass
class TrainConfig(OptimizerConfig):
    """Length, speed and place of a run, on top of what `OptimizerConfig` holds."""

    batch_tokens: int = 2**20
    """Tokens per step over all ranks, padding included: batch_tokens / data.seq_len packed sequences. Each sequence is
    a micro-batch of its own, so a larger step takes more time but no more memory."""
    text_learning_rate_ratio: float = 0.0
    """Learning rate of the text tower divided by that of the image tower; 0 freezes the text tower, bit for bit."""
    optimizer: str = "adamw"
    """"adamw" keeps its two moments of each weight in float32; "adamw_8bit" in 8 bits (needs torchao), which saves 6
    bytes per weight."""
    dtype: str = "float32"
    """"float32" or "bfloat16": dtype of the activations and the frozen weights. Trained weights are always float32.
    "auto": bfloat16 if the device multiplies it faster (GPUs since Ampere, processors with AMX or AVX-512 BF16)."""
    recompute: str = "none"
    """What the backward of a layer computes again instead of keeping it, with the same gradients: "none", "ffn" (gate
    and up: about half of the activations, for one more GEMM) or "layer" (everything except the layer's input)."""
    compile: bool = False
    """Let torch.compile fuse the operations between a layer's kernels; the first steps then take minutes longer."""
    tensorboard: bool = False
    """Also write metrics, validation losses and samples for TensorBoard, into <output>/tensorboard."""
    wandb: str | None = None
    """Also send them to this project of Weights & Biases."""
    profile: tuple[int, int] | None = None
    """Record a trace of the steps from the first number to the second, into <output>/profile."""
    peak_tflops: float | None = None
    """The peak rate of the device in 10^12 operations per second, which MFU is a share of. None: measure it at the
    start, with large matrix products in train.dtype."""

    def __post_init__(self) -> None:
        if self.dtype == "auto":
            check_choice("train.device", self.device, DEVICES)
            self.dtype = "bfloat16" if has_fast_bfloat16(self.device) else "float32"
        super().__post_init__()
        check_least(self, "train", batch_tokens=1, text_learning_rate_ratio=0)
        if self.peak_tflops is not None:
            check_positive("train.peak_tflops", self.peak_tflops)
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"train.profile must be a first and a last step, from 1, got {list(self.profile)}")
        if self.wandb is not None and not self.wandb.strip():
            raise ValueError("train.wandb is empty; give the name of a project, or null")
        check_choice("train.optimizer", self.optimizer, OPTIMIZERS)
        check_choice("train.recompute", self.recompute, RECOMPUTE)


@dataclass
class SampleConfig:
    """Images generated during training, to watch its progress."""

    prompts: list[str] = field(default_factory=list)
    """Each gives one row of the sample grid; none: no grids."""
    every: int = 1000
    """Steps between sample grids."""
    num_images: int = 4
    """Images per prompt, with different seeds."""
    sampler: str = "dpm-solver"
    num_steps: int = 20
    guidance_scale: float = 1.55

    def __post_init__(self) -> None:
        check_choice("sample.sampler", self.sampler, SAMPLERS)
        check_least(self, "sample", every=1, num_images=1, num_steps=1, guidance_scale=0)
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("sample.prompts must hold no empty prompt; write one, or leave it out")


@dataclass
class ValidationConfig:
    """Losses on samples that are not trained on, with the averaged weights and the same noise every time."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Held-out sources, written as data.sources; none: no validation."""
    every: int = 1000
    """Steps between validations."""
    num_samples: int = 256
    """The same samples every time; a source with fewer gives all of them."""

    def __post_init__(self) -> None:
        check_least(self, "validation", every=1, num_samples=1)


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: int = 1000
    """Steps between checkpoints. One is also written at the end, and when the run is interrupted."""
    keep_last: int = 2
    """Older checkpoints are deleted once their successor is complete."""

    def __post_init__(self) -> None:
        check_least(self, "checkpoint", every=1, keep_last=1)


@dataclass
class RunConfig:
    """One training run."""

    output: str
    """Folder of the run: checkpoints, metrics.jsonl, samples and the trained model. A run resumes from its folder."""
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
                f"train.batch_tokens must be a multiple of data.seq_len, {self.data.seq_len}, "
                f"got {self.train.batch_tokens}; a step consists of whole packed sequences"
            )
        reads_images = any(source.kind != "latents" for source in self.data.sources)
        if self.data.sample_latents and self.model.base and reads_images and self.model.codec.kind != "autoencoder_kl":
            raise ValueError(
                f"data.sample_latents must be false with a codec of kind {self.model.codec.kind!r}, whose latents have "
                "no variance"
            )
        num_timesteps = self.model.diffusion.num_train_timesteps
        if self.sample.num_steps > num_timesteps:
            raise ValueError(
                f"sample.num_steps must be at most {num_timesteps}, the timesteps of model.diffusion, "
                f"got {self.sample.num_steps}"
            )

    @property
    def sequences_per_step(self) -> int:
        """Packed sequences per step, over all ranks."""
        return self.train.batch_tokens // self.data.seq_len


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The training run that a YAML recipe describes; see `read_recipe`."""
    return read_recipe(RunConfig, recipe, overrides)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value`, of the key `name`, is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {short_repr(value)}")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value`, of the key `name`, is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}")
