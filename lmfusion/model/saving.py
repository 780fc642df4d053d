"""How does a model get to disk and back? Safetensors, JSON, and a record of the base LLM with a digest of each tensor.

A saved model is a folder:

    config.json          configuration of the base (an LLM, or a VLM around one), image tower, codec and diffusion
    base.json            which parts are saved; where the base was, its dtype, and the sha256 of each of its tensors;
                         the sha256 of the tokenizer's files
    training.json        what the image tower was trained with, if that is known
    model.safetensors    tensors under `image.`, and under `text.` and a VLM's `vision.` if all parts are saved (in
                         shards above 4 GB)
    README.md            a model card, see `lmfusion.model.model_card`
    codec/               the autoencoder, if there is one and all parts are saved, or it was in the folder before
    tokenizer files      as transformers writes them, and the configuration of a VLM's image processor
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.initialization import no_init_weights

from lmfusion.conversion import EMBEDDING_NAME, BaseModel, load_base, names
from lmfusion.conversion.huggingface import read_safetensors
from lmfusion.conversion.tokenizer import check_tokenizer, read_tokenizer
from lmfusion.conversion.vlm import PROCESSOR_FILES, read_image_processor
from lmfusion.model.codec import WEIGHTS_NAME, Codec, CodecConfig, load_codec
from lmfusion.model.configuration import ImageTowerConfig, LMFusionConfig
from lmfusion.model.diffusion import DiffusionConfig
from lmfusion.model.model_card import CARD_NAME, model_card
from lmfusion.model.patch_coder import build_patch_coder
from lmfusion.model.saved_files import (
    BASE_NAME,
    CODEC_NAME,
    CONFIG_NAME,
    HASHED_FILES,
    PARTS,
    TRAINING_NAME,
    BaseRecord,
    Origin,
    blaming,
    check_files,
    check_values,
    read_config,
    read_json,
    read_training,
)
from lmfusion.model.vision import VisionEncoder
from lmfusion.utils.config_values import short_repr, truncate
from lmfusion.utils.files import file_sha256, full_path
from lmfusion.utils.folders import current_folder, replace_folder
from lmfusion_kernels.ops.lora import is_adapted

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

MAX_SHARD_BYTES = 4 * 10**9
OWN_FILES = (
    CONFIG_NAME,
    BASE_NAME,
    TRAINING_NAME,
    *HASHED_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    *PROCESSOR_FILES,
)
"""Files that belong to a saved model, beside its tensors: those of an older model do not outlive it."""


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 of the bytes of each tensor of a base, named as in `BaseRecord.sha256`. `tensors`: by file name."""

    def digest(tensor: Tensor) -> str:
        flat = tensor.detach().cpu().contiguous().flatten()
        return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()  # type: ignore[arg-type]

    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter's lock
        return dict(zip(map(names.to_llama, tensors), pool.map(digest, tensors.values()), strict=True))


def text_tensors(model: "LMFusion") -> dict[str, Tensor]:
    """The text tower's tensors by file name."""
    return _file_tensors(model, "text.")


def base_tensors(model: "LMFusion") -> dict[str, Tensor]:
    """All that came from the base, by file name: the text tower's tensors, and a VLM's that it sees with."""
    return text_tensors(model) | _file_tensors(model, "vision.")


def _file_tensors(model: "LMFusion", prefix: str) -> dict[str, Tensor]:
    tensors = {name: tensor.cpu() for name, tensor in _under(prefix, model.state_dict()).items()}
    return names.split(tensors, model.config.text_config)


def from_base(
    cls: type["LMFusion"],
    base: BaseModel,
    image: ImageTowerConfig | dict[str, Any] | None,
    codec: CodecConfig | dict[str, Any] | None,
    diffusion: DiffusionConfig | dict[str, Any] | None,
    seed: int = 0,
) -> "LMFusion":
    """See `LMFusion.from_llm` and `from_vlm`. Empties `base.tensors`."""
    config = LMFusionConfig(base.config, image, codec, diffusion, vlm_config=base.vlm_config)
    if config.codec.path is not None:
        config.codec = replace(config.codec, path=str(full_path(config.codec.path)))
    sha256 = digests(base.tensors)
    model = _assemble(cls, config, base.name, base.tensors, base.read_tokenizer(), seed=seed)
    _set_image_processor(model, base.read_image_processor())
    model.base = BaseRecord(base.name, str(model.text.norm.weight.dtype).removeprefix("torch."), sha256)
    _check_image_fits(model)
    return model


def _set_image_processor(model: "LMFusion", image_processor: Any) -> None:
    if model.vision is not None:
        model.vision.image_processor = image_processor
        model.vision.check_image_processor()


def _check_image_fits(model: "LMFusion") -> None:
    context = getattr(model.config.text_config, "max_position_embeddings", None)
    if context is not None and model.tokens_per_image + 2 > context:
        raise ValueError(
            f"an image of {model.codec.config.image_size} pixels is {model.tokens_per_image} rows with codec "
            f"{model.codec.config.kind!r} and patch_size {model.config.image.patch_coder.patch_size}, but the LLM's "
            f"context is {context}; use an autoencoder as codec, smaller images, or a larger patch_size"
        )


def _assemble(
    cls: type["LMFusion"],
    config: LMFusionConfig,
    name: str,
    frozen: dict[str, Tensor],
    tokenizer: Any,
    image: dict[str, Tensor] | None = None,
    seed: int = 0,
) -> "LMFusion":
    """A model that holds the given tensors (file names; both dicts are emptied); without `image` that part is drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if config.vlm_config is not None:  # before memory is taken for what the configuration asks for
            with blaming(name):
                seeing = VisionEncoder(config.vlm_config, "meta").state_dict(prefix="vision.")
            names.check_tensors(_under("vision.", frozen), seeing, name)
        codec = load_codec(config.codec)
        model, expected = _build(cls, config, codec, name)
        names.check_tensors(frozen, _under("text.", expected) | _under("vision.", expected), name)
        dtype = frozen[EMBEDDING_NAME].dtype
        model.load_state_dict(names.stack(frozen), strict=False, assign=True)
        if image is None:
            tower = model.image.to(dtype).to_empty(device="cpu")
            tower.patch_coder = build_patch_coder(
                config.image.patch_coder, codec.latent_channels, tower.norm.weight.numel()
            )
            tower.patch_coder.to(dtype)
            tower.initialize(model.text)
        else:
            names.check_tensors(image, _under("image.", expected), name)
            model.load_state_dict(names.stack(image), strict=False, assign=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    if tokenizer is not None:
        check_tokenizer(tokenizer, config.text_config.vocab_size, name)
    model.tokenizer = tokenizer
    model.freeze_text()
    return model.eval()


def _build(
    cls: type["LMFusion"], config: LMFusionConfig, codec: Codec, name: str
) -> tuple["LMFusion", dict[str, Tensor]]:
    """A model without memory for its tensors, and these tensors by file name."""
    with blaming(name), torch.device("meta"), no_init_weights():
        model = cls(config, codec)
        return model, names.split(model.state_dict(), config.text_config)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load(
    cls: type["LMFusion"],
    path: Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    codec_path: str | Path | None = None,
) -> "LMFusion":
    """See `LMFusion.from_pretrained`."""
    folder, config = read_config(path, codec_path)
    origin = Origin.read(folder)
    check_files(folder, origin.files)
    tensors = read_safetensors(folder)
    check_values(folder, tensors)
    frozen = _under("text.", tensors) | _under("vision.", tensors)
    image = {name: tensor for name, tensor in tensors.items() if name not in frozen}
    record = origin.base
    if record is not None and (origin.parts == "image" or base is not None):
        found = _load_recorded_base(record, base)
        if base is not None:
            record.name = found.name
        if origin.parts == "image":
            frozen |= found.tensors
        del found
    model = _assemble(cls, config, str(folder), frozen, read_tokenizer(folder), image)
    image_processor = read_image_processor(folder)
    with blaming(str(folder / CONFIG_NAME)):
        _set_image_processor(model, image_processor)
        _check_image_fits(model)
    model.name_or_path = model.config.name_or_path = str(full_path(path))
    model.base = record
    if (folder / TRAINING_NAME).exists():
        model.trained = read_training(folder / TRAINING_NAME)
    if dtype is not None:
        for part in (model.text, model.image, model.vision):
            if part is not None:
                part.to(dtype)
    return model


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
    changed = differing(record.sha256, digests(found.tensors))
    if changed:
        raise ValueError(
            f"the base LLM at {path} is not the one this model was made from: {len(changed)} of {len(record.sha256)} "
            f"tensors differ, first {changed[0]!r}; give the place of the original with base="
        )
    return found


def differing(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names whose digests differ or that only one side has, in order."""
    return [name for name in {**expected, **found} if expected.get(name) != found.get(name)]


def save(model: "LMFusion", path: Path, parts: str = "image") -> None:
    """See `LMFusion.save_pretrained`."""
    if parts not in PARTS:
        raise ValueError(f"parts is {parts!r}; it must be one of {', '.join(PARTS)}")
    if parts == "image":
        if model.base is None:
            raise ValueError(
                "this model was made without a base LLM, so its text part has no other home; use parts='all'"
            )
        if model.base.may_differ:
            raise ValueError("the text tower has been trainable, so it is no longer the base LLM; use parts='all'")
        if not has_base(model):
            raise ValueError(
                f"the base LLM is not at {model.base.name} any more, and the image part cannot be loaded without it; "
                "load the model with base= and the place where it is now, or use parts='all'"
            )
    _check_not_adapted(model)
    if model.tokenizer is not None:
        check_tokenizer(model.tokenizer, model.config.text_config.vocab_size, "the model's tokenizer")
    path = full_path(path)
    there = current_folder(path)
    _check_replaceable(there)
    card = there / CARD_NAME
    # What is no UTF-8, and how lines end, is somebody's matter too
    previous = card.read_bytes().decode("utf-8", errors="surrogateescape") if card.is_file() else None
    codec = model.config.codec.path
    with_codec = codec is not None and (parts == "all" or Path(codec).is_relative_to(there))
    _replace(path, lambda folder: _write(model, path, folder, parts, with_codec, previous))


def save_text(model: "LMFusion", path: Path) -> None:
    """See `LMFusion.save_text`."""
    _check_not_adapted(model)
    path = full_path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists; give the path of a new or an empty folder")
    _replace(path, lambda folder: _write_text(model, folder))


def _check_not_adapted(model: "LMFusion") -> None:
    adapted = [name for name, module in model.named_modules() if is_adapted(module) or "modules_to_save" in name]
    if adapted:
        raise ValueError(
            f"peft's adapters are on the model, first at {adapted[0]}; save them with the peft model's own "
            "save_pretrained, or make them part of the weights with its merge_and_unload() and save what that gives"
        )


def has_base(model: "LMFusion") -> bool:
    """Whether the base LLM is where the model was made from. Names on the hub are taken for granted."""
    return model.base is not None and (not Path(model.base.name).is_absolute() or Path(model.base.name).exists())


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, and only when that is complete and on the disk, put it in the place of `path`."""

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
    if not config.is_file() or read_json(config).get("model_type") != LMFusionConfig.model_type:
        raise ValueError(f"{path} exists and holds no lmfusion model; give the path of a new or an empty folder")


def _write(
    model: "LMFusion", path: Path, folder: Path, parts: str, with_codec: bool, previous_card: str | None
) -> None:
    """Everything of the model that is to be at `path` into the empty `folder`."""
    config = copy.deepcopy(model.config)
    if with_codec:
        _copy_codec(config.codec, folder / CODEC_NAME)
        config.codec.path = CODEC_NAME
    (folder / CONFIG_NAME).write_text(config.to_json_string(), encoding="utf-8")
    if model.trained is not None:
        (folder / TRAINING_NAME).write_text(json.dumps(asdict(model.trained), indent=1), encoding="utf-8")
    card = model_card(model, parts, previous_card)
    if card is not None:
        (folder / CARD_NAME).write_bytes(card.encode("utf-8", errors="surrogateescape"))
    _write_tokenizer(model, folder)
    files = {name: file_sha256(folder / name) for name in HASHED_FILES if (folder / name).is_file()}
    origin = Origin(parts, model.base, files)
    (folder / BASE_NAME).write_text(json.dumps(asdict(origin), indent=1), encoding="utf-8")
    _write_image_processor(model, folder)
    tensors = _file_tensors(model, "image.")
    if parts == "all":
        tensors |= base_tensors(model)
    check_values(path, tensors)
    _write_tensors(tensors, folder)


def _copy_codec(codec: CodecConfig, folder: Path) -> None:
    """The files of the autoencoder into the new `folder`, as they were when the model was loaded."""
    assert codec.path is not None
    folder.mkdir()
    for name in ("config.json", WEIGHTS_NAME):
        shutil.copyfile(Path(codec.path) / name, folder / name)
    if file_sha256(folder / WEIGHTS_NAME) != codec.sha256:
        raise OSError(f"the autoencoder in {codec.path} has changed since the model was loaded; put it back")


def _write_text(model: "LMFusion", folder: Path) -> None:
    """The text tower as the checkpoint of a Llama-type LLM into the empty `folder`."""
    config = copy.deepcopy(model.config.text_config)
    config.dtype = model.dtype
    config.save_pretrained(folder)
    _write_tokenizer(model, folder)
    _write_tensors({names.to_llama(name): tensor for name, tensor in text_tensors(model).items()}, folder)


def _write_tokenizer(model: "LMFusion", folder: Path) -> None:
    if model.tokenizer is None:
        return
    try:
        model.tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises no narrower one when the disk is full
        raise OSError(f"the tokenizer could not be written: {error}") from error


def _write_image_processor(model: "LMFusion", folder: Path) -> None:
    if model.vision is None:
        return
    try:
        model.vision.image_processor.save_pretrained(folder)
    except Exception as error:  # as for the tokenizer
        raise OSError(f"the image processor could not be written: {error}") from error


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
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file_name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
