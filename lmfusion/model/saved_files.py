"""Reads and checks the JSON files of a saved model. `lmfusion.model.saving` lists the files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmfusion.conversion.huggingface import without_code
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.model_card import TrainingRecord
from lmfusion.utils.config_values import from_values, read_json_object, short_repr, truncate, values_sha256
from lmfusion.utils.files import file_sha256, full_path, name_os_errors
from lmfusion.utils.folders import current_folder

CONFIG_NAME = "config.json"
BASE_NAME = "base.json"
CODEC_NAME = "codec"
TRAINING_NAME = "training.json"
PARTS = ("image", "all")
DTYPES = ("float32", "float64", "bfloat16", "float16")
HASHED_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""What the token ids of a text depend on. Chat templates lie in other files, and may be edited."""


@dataclass
class BaseRecord:
    """The base LLM or VLM a model was made from."""

    name: str
    """Absolute path, or name on the hub."""
    dtype: str
    """In which its tensors were hashed, such as "float32"."""
    sha256: dict[str, str]
    """Of each frozen tensor: text by the name a Llama checkpoint gives it, a VLM's others by file name."""
    may_differ: bool = False
    """Whether the text tower has been trainable since, so that its tensors may no longer be the base's."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"base.dtype is {short_repr(self.dtype)}; it must be one of {', '.join(DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def digest(self) -> str:
        """One sha256 for all tensors."""
        return values_sha256(self.sha256)


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Turn whatever torch and transformers raise on the values of a file into a ValueError with the file's name."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"cannot build a model from {name}: {truncate(str(error) or type(error).__name__)}") from error


def read_config(path: Path, codec_path: str | Path | None = None) -> tuple[Path, LMFusionConfig]:
    """Where the model saved at `path` lies, and its configuration. Raises what `LMFusion.from_pretrained` raises."""
    path = full_path(path)
    folder = current_folder(path)
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"no saved model at {path}: it holds no {CONFIG_NAME}; `lmfusion adapt` makes one")
    settings = without_code(read_json(file))
    if settings.get("model_type") != LMFusionConfig.model_type:
        raise ValueError(
            f"{path} holds a model of type {short_repr(settings.get('model_type'))}, not 'lmfusion'; make a model of an LLM "
            "with LMFusion.from_llm or `lmfusion adapt`"
        )
    with blaming(str(file)):
        config = LMFusionConfig(**{key: value for key, value in settings.items() if key != "model_type"})
    if codec_path is not None:
        if config.codec.path is None:
            raise ValueError(
                f"codec_path is {codec_path}, but the model at {path} draws pixels, without an autoencoder; leave it "
                "out"
            )
        config.codec.path = str(full_path(codec_path))
    elif config.codec.path is not None:  # relative: saved along with the model
        config.codec.path = str(folder / Path(config.codec.path).expanduser())
    return folder, config


@dataclass
class Origin:
    """What base.json says."""

    parts: str
    """"image" or "all"."""
    base: BaseRecord | None = None
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each of HASHED_FILES that was saved; empty: it was not recorded."""

    def __post_init__(self) -> None:
        if self.parts not in PARTS or (self.parts == "image" and self.base is None):
            raise ValueError('parts must be "all", or "image" with a base LLM')

    @classmethod
    def read(cls, folder: Path) -> "Origin":
        """That of the model in `folder`. Raises FileNotFoundError and ValueError as `LMFusion.from_pretrained` does."""
        file = folder / BASE_NAME
        try:
            return from_values(cls, read_json(file))
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}; copy it again from its source") from error


def saved_parts(path: str | Path) -> str:
    """Which parts the model saved at `path` holds, "image" or "all". Raises what `LMFusion.from_pretrained` raises."""
    folder, _ = read_config(Path(path))
    return Origin.read(folder).parts


def check_files(folder: Path, sha256: Mapping[str, str]) -> None:
    for name, expected in sha256.items():
        if name not in HASHED_FILES:
            raise ValueError(
                f"{folder / BASE_NAME} is damaged: it lists the unknown file {short_repr(name)}; copy it again"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; copy the whole folder of the model again")
        if file_sha256(folder / name) != expected:
            raise ValueError(
                f"{folder / name} is not the file that was saved with this model, so texts may get other token ids; "
                f"copy it again from its source, or remove it from `files` in {BASE_NAME} if you changed it on purpose"
            )


def check_values(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"{folder}: {name!r} holds {dtype}; weights are {', '.join(DTYPES)}")
        # Smallest and largest are NaN where one is, and this takes a twentieth of the time of isfinite()
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ValueError(f"{folder}: {name!r} holds values that are not finite; take the model of an earlier step")


def read_training(file: Path) -> TrainingRecord:
    try:
        return from_values(TrainingRecord, read_json(file), TRAINING_NAME)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; copy it again from its source, or delete it") from error


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the whole folder of the model again")
    try:
        with name_os_errors(path):
            return read_json_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again from its source") from error
