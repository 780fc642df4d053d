"""Saves models and loads them: safetensors, JSON, and a record of the base with a digest of each tensor.

A saved model is a folder:

    config.json          configuration of the base (an LLM, or a VLM around one), image tower, codec and diffusion
    base.json            which parts are saved; where the base was, its dtype, and the sha256 of each of its tensors;
                         the sha256 of the tokenizer's files
    training.json        how the image tower was trained, if that is known
    model.safetensors    tensors under `image.`, and under `text.` and a VLM's `vision.` if all parts are saved (in
                         shards above 4 GB)
    README.md            a model card, see `lmfusion.model.model_card`
    codec/               the autoencoder, if there is one and all parts are saved, or it was in the folder before
    tokenizer files      as transformers writes them, and the configuration of a VLM's image processor

Functions here take and return `ModelData`. `lmfusion.model.assembly` makes modules of it.
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmfusion.conversion import BaseModel, load_base, names
from lmfusion.conversion.huggingface import INDEX_NAME, SINGLE_NAME, read_safetensors
from lmfusion.conversion.tokenizer import (
    PROCESSOR_FILES,
    TOKENIZER_SETTINGS_FILES,
    VOCABULARY_FILES,
    check_tokenizer,
    read_tokenizer,
)
from lmfusion.conversion.vlm import read_image_processor
from lmfusion.model.codec import WEIGHTS_NAME, CodecConfig
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.model_card import CARD_NAME, ModelSummary, model_card
from lmfusion.model.records import BaseRecord, TrainingRecord, changed_digests, tensor_digests
from lmfusion.model.saved_files import (
    BASE_NAME,
    CODEC_NAME,
    CONFIG_NAME,
    PARTS,
    TRAINING_NAME,
    SavedParts,
    check_files,
    check_values,
    read_config,
    read_training,
)
from lmfusion.utils.config_values import short_repr, truncate
from lmfusion.utils.files import full_path
from lmfusion.utils.folders import current_folder, replace_folder
from lmfusion.utils.hashing import file_sha256
from lmfusion.utils.json_files import read_json_object

MAX_SHARD_BYTES = 4 * 10**9
OWN_FILES = (CONFIG_NAME, BASE_NAME, TRAINING_NAME, *VOCABULARY_FILES, *TOKENIZER_SETTINGS_FILES, *PROCESSOR_FILES)
"""Files of a saved model, beside its tensors. Saving deletes those of an older model that the new one lacks."""


@dataclass
class ModelData:
    """A model as plain data."""

    config: LMFusionConfig
    tensors: dict[str, Tensor]
    """By file name (`image.layers.0.self_attn.q_proj.weight`), see `lmfusion.conversion.names`."""
    tokenizer: Any
    """transformers' tokenizer, or None."""
    image_processor: Any
    """transformers' image processor of a VLM, or None."""
    base: BaseRecord | None = None
    trained: TrainingRecord | None = None


def from_prefixes(tensors: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The tensors whose names begin with one of `prefixes`."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def load(path: Path, base: str | Path | None = None, codec_path: str | Path | None = None) -> ModelData:
    """The model saved at `path`, read and checked. Parameters and errors are those of `LMFusion.from_pretrained`."""
    folder, config = read_config(path, codec_path)
    saved = SavedParts.read(folder)
    check_files(folder, saved.files)
    tensors = read_safetensors(folder)
    check_values(folder, tensors)
    record = saved.base
    if record is not None and (saved.parts == "image" or base is not None):
        found = _load_recorded_base(record, base)
        if base is not None:
            record.name = found.name
        if saved.parts == "image":
            tensors = found.tensors | tensors
        del found
    trained = read_training(folder / TRAINING_NAME) if (folder / TRAINING_NAME).exists() else None
    return ModelData(config, tensors, read_tokenizer(folder), read_image_processor(folder), record, trained)


def _load_recorded_base(record: BaseRecord, base: str | Path | None) -> BaseModel:
    """The base, after comparing every digest."""
    path = record.name if base is None else base
    try:
        found = load_base(path, record.torch_dtype)
    except OSError as error:
        raise FileNotFoundError(
            f"the base LLM of this model is not at {short_repr(str(path))} any more; give its place with base= "
            f"({truncate(str(error))})"
        ) from error
    changed = changed_digests(record.sha256, tensor_digests(found.tensors))
    if changed:
        raise ValueError(
            f"the base LLM at {path} is not the one this model was made from: {len(changed)} of {len(record.sha256)} "
            f"tensors differ, first {changed[0]!r}; give the place of the original with base="
        )
    return found


def check_parts(parts: str, base: BaseRecord | None) -> None:
    """Raise ValueError where a model with this `base` cannot be saved as `parts`: it could not be loaded again."""
    if parts not in PARTS:
        raise ValueError(f"parts must be one of {', '.join(PARTS)}, got {parts!r}")
    if parts == "all":
        return
    if base is None:
        raise ValueError("this model was made without a base LLM, so its text part has no other home; use parts='all'")
    if base.may_differ:
        raise ValueError("the text tower has been trainable, so it is no longer the base LLM; use parts='all'")
    if not base.is_available:
        raise ValueError(
            f"the base LLM is not at {base.name} any more, and the image part cannot be loaded without it; "
            "load the model with base= and the place where it is now, or use parts='all'"
        )


def save(data: ModelData, summary: ModelSummary, path: Path, parts: str) -> None:
    """Save `data`, whose tensors are those of `parts`, into the folder `path`: see `LMFusion.save_pretrained`."""
    if data.tokenizer is not None:
        check_tokenizer(data.tokenizer, data.config.text_config.vocab_size, "the model's tokenizer")
    path = full_path(path)
    old = current_folder(path)
    _check_replaceable(old)
    card = old / CARD_NAME
    # A card that somebody edited may hold bytes that are not UTF-8, and line endings of its own: keep both
    previous = card.read_bytes().decode("utf-8", errors="surrogateescape") if card.is_file() else None
    codec = data.config.codec.path
    with_codec = codec is not None and (parts == "all" or Path(codec).is_relative_to(old))
    text = model_card(data.config, summary, data.base, data.trained, parts, previous)
    _replace(path, lambda folder: _write(data, path, folder, parts, with_codec, text))


def save_text(data: ModelData, path: Path) -> None:
    """Save the text tower in `data` as the checkpoint of a Llama-type LLM: see `LMFusion.save_text`."""
    path = full_path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists; give the path of a new or an empty folder")
    _replace(path, lambda folder: _write_text(data, folder))


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, which takes the place of `path` once it is complete and on the disk."""

    def write_all(folder: Path) -> None:
        write(folder)
        mode = (folder / CONFIG_NAME).stat().st_mode
        for file in folder.glob("*.safetensors"):
            file.chmod(mode)  # safetensors makes them private

    try:
        replace_folder(path, write_all, is_stale=_is_own)
    except (OSError, SafetensorError) as error:
        kept = "; what was saved there before is untouched" if path.exists() else ""
        raise OSError(f"could not save the model to {path}: {error}{kept}") from error


def _is_own(name: str) -> bool:
    """Whether a file in a model's folder is one of the model."""
    return name in OWN_FILES or (name.startswith("model") and ".safetensors" in name)


def _check_replaceable(path: Path) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    config = path / CONFIG_NAME
    if not config.is_file() or read_json_object(config).get("model_type") != LMFusionConfig.model_type:
        raise ValueError(f"{path} exists and holds no lmfusion model; give the path of a new or an empty folder")


def _write(data: ModelData, path: Path, folder: Path, parts: str, with_codec: bool, card: str | None) -> None:
    """Write all files of the model that is going to be at `path` into the empty `folder`."""
    config = copy.deepcopy(data.config)
    if with_codec:
        _copy_codec(config.codec, folder / CODEC_NAME)
        config.codec.path = CODEC_NAME
    (folder / CONFIG_NAME).write_text(config.to_json_string(), encoding="utf-8")
    if data.trained is not None:
        (folder / TRAINING_NAME).write_text(json.dumps(asdict(data.trained), indent=1), encoding="utf-8")
    if card is not None:
        (folder / CARD_NAME).write_bytes(card.encode("utf-8", errors="surrogateescape"))
    _write_with("tokenizer", data.tokenizer, folder)
    files = {name: file_sha256(folder / name) for name in VOCABULARY_FILES if (folder / name).is_file()}
    saved = SavedParts(parts, data.base, files)
    (folder / BASE_NAME).write_text(json.dumps(asdict(saved), indent=1), encoding="utf-8")
    _write_with("image processor", data.image_processor, folder)
    check_values(path, data.tensors)
    _write_tensors(data.tensors, folder)


def _copy_codec(codec: CodecConfig, folder: Path) -> None:
    """Copy the files of the autoencoder into the new `folder`, if they are as they were when the model was loaded."""
    assert codec.path is not None
    folder.mkdir()
    for name in ("config.json", WEIGHTS_NAME):
        shutil.copyfile(Path(codec.path) / name, folder / name)
    if file_sha256(folder / WEIGHTS_NAME) != codec.sha256:
        raise OSError(f"the autoencoder in {codec.path} has changed since the model was loaded; put it back")


def _write_text(data: ModelData, folder: Path) -> None:
    """Write the text tower as the checkpoint of a Llama-type LLM into the empty `folder`."""
    config = copy.deepcopy(data.config.text_config)
    config.dtype = data.tensors["text.norm.weight"].dtype
    config.save_pretrained(folder)
    _write_with("tokenizer", data.tokenizer, folder)
    _write_tensors({names.to_llama(name): tensor for name, tensor in data.tensors.items()}, folder)


def _write_with(what: str, writer: Any, folder: Path) -> None:
    """Let transformers write the tokenizer or image processor `writer`, if there is one."""
    if writer is None:
        return
    try:
        writer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises no narrower one when the disk is full
        raise OSError(f"the {what} could not be written: {error}") from error


def _write_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > MAX_SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE_NAME, metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file_name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
