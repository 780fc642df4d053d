"""Reads and checks the files of a saved model other than its tensors. `lmfusion.model.saving` lists them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lmfusion.conversion.huggingface import CONFIG_NAME, without_code
from lmfusion.conversion.tokenizer import VOCABULARY_FILES
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.records import DTYPES, BaseRecord, TrainingRecord
from lmfusion.utils.config_values import from_values, short_repr, truncate
from lmfusion.utils.files import full_path
from lmfusion.utils.folders import current_folder
from lmfusion.utils.hashing import file_sha256
from lmfusion.utils.json_files import read_json_object

BASE_NAME = "base.json"
CODEC_NAME = "codec"
TRAINING_NAME = "training.json"
PARTS = ("image", "all")


@contextmanager
def name_model_errors(name: str) -> Iterator[None]:
    """Turn what torch and transformers raise on the values of the file `name` into a ValueError that names it."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"cannot build a model from {name}: {truncate(str(error) or type(error).__name__)}") from error


def read_config(path: Path, codec_path: str | Path | None = None) -> tuple[Path, LMFusionConfig]:
    """The folder of the model saved at `path`, and its configuration. Raises what `LMFusion.from_pretrained` raises."""
    path = full_path(path)
    folder = current_folder(path)
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"no saved model at {path}: it holds no {CONFIG_NAME}; `lmfusion adapt` makes one")
    settings = without_code(read_json_object(file))
    if settings.get("model_type") != LMFusionConfig.model_type:
        raise ValueError(
            f"{path} must hold a model of type 'lmfusion', got {short_repr(settings.get('model_type'))}; make one from "
            "an LLM with LMFusion.from_llm or `lmfusion adapt`"
        )
    with name_model_errors(str(file)):
        config = LMFusionConfig(**{key: value for key, value in settings.items() if key != "model_type"})
    if codec_path is not None:
        if config.codec.path is None:
            raise ValueError(
                f"codec_path must be left out, since the model at {path} works on pixels, without an autoencoder; got "
                f"{codec_path}"
            )
        config.codec.path = str(full_path(codec_path))
    elif config.codec.path is not None:  # relative: saved along with the model
        config.codec.path = str(folder / Path(config.codec.path).expanduser())
    return folder, config


@dataclass
class SavedParts:
    """What base.json holds."""

    parts: str
    """"image" or "all"."""
    base: BaseRecord | None = None
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each saved file of VOCABULARY_FILES; empty: not recorded."""

    def __post_init__(self) -> None:
        if self.parts not in PARTS or (self.parts == "image" and self.base is None):
            raise ValueError('parts must be "all", or "image" with a base LLM')

    @classmethod
    def read(cls, folder: Path) -> "SavedParts":
        """Read the record of the model in `folder`. Raises FileNotFoundError and ValueError, naming the file."""
        file = folder / BASE_NAME
        values = read_json_object(file)
        try:
            return from_values(cls, values)
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}; copy it again from its source") from error


def saved_parts(path: str | Path) -> str:
    """Which parts the model saved at `path` holds, "image" or "all". Raises what `LMFusion.from_pretrained` raises."""
    folder, _ = read_config(Path(path))
    return SavedParts.read(folder).parts


def check_files(folder: Path, sha256: Mapping[str, str]) -> None:
    """Raise FileNotFoundError or ValueError where a tokenizer's file in `folder` is missing or has another sha256."""
    for name, expected in sha256.items():
        if name not in VOCABULARY_FILES:
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
    """Raise ValueError for a tensor of another dtype than weights have, or with a value that is not finite."""
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"{folder}: {name!r} must have a dtype of {', '.join(DTYPES)}, got {dtype}")
        # If any value is NaN, so are the minimum and maximum; and aminmax takes a twentieth of the time of isfinite()
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ValueError(
                f"{folder}: {name!r} must hold finite values, got NaN or infinity; take the model of an earlier step"
            )


def read_training(file: Path) -> TrainingRecord:
    """Raises ValueError, naming the file, where it is damaged."""
    values = read_json_object(file)
    try:
        return from_values(TrainingRecord, values, TRAINING_NAME)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; copy it again from its source, or delete it") from error
