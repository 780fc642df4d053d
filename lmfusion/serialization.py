"""How does a model get to disk and back? Safetensors, JSON, and a record of the base LLM with a digest of each tensor.

A saved model is a folder:

    config.json          configuration of the base (an LLM, or a VLM around one), image tower, codec and diffusion
    base.json            which parts are saved; where the base was, its dtype, and the sha256 of each of its tensors
    training.json        what the image tower was trained with, if that is known
    model.safetensors    tensors under `image.`, and under `text.` and a VLM's `vision.` if all parts are saved (in
                         shards above 4 GB)
    README.md            a model card, see `lmfusion.model_card`
    codec/               if all parts are saved: the autoencoder, if there is one
    tokenizer files      as transformers writes them, and the configuration of a VLM's image processor
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.initialization import no_init_weights

from lmfusion.config_values import from_values
from lmfusion.configuration import ImageTowerConfig, LMFusionConfig
from lmfusion.conversion import EMBEDDING_NAME, BaseModel, load_base, names
from lmfusion.conversion.huggingface import read_safetensors, without_code
from lmfusion.conversion.tokenizer import check_tokenizer, read_tokenizer
from lmfusion.conversion.vlm import read_image_processor
from lmfusion.diffusion import DiffusionConfig
from lmfusion.files import flush
from lmfusion.image.codec import WEIGHTS_NAME, CodecConfig, load_codec
from lmfusion.image.patch_coder import build_patch_coder
from lmfusion.model_card import CARD_NAME, TrainingRecord, model_card
from lmfusion.vision import VisionEncoder
from lmfusion_kernels.lora import is_adapted

if TYPE_CHECKING:
    from lmfusion.modeling import LMFusion

CONFIG_NAME = "config.json"
BASE_NAME = "base.json"
CODEC_NAME = "codec"
TRAINING_NAME = "training.json"
PARTS = ("image", "all")
MAX_SHARD_BYTES = 4 * 10**9


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

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def digest(self) -> str:
        """One sha256 for all tensors."""
        return digest_of(self.sha256)


def digest_of(sha256: Mapping[str, str]) -> str:
    """One sha256 for the tensors that have these."""
    return hashlib.sha256(json.dumps(sha256, sort_keys=True).encode()).hexdigest()


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
        config.codec = replace(config.codec, path=str(Path(config.codec.path).resolve()))
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
            seeing = VisionEncoder(config.vlm_config, "meta").state_dict(prefix="vision.")
            names.check_tensors(_under("vision.", frozen), seeing, name)
        codec = load_codec(config.codec)
        with torch.device("meta"), no_init_weights():
            model = cls(config, codec)
        expected = names.split(model.state_dict(), config.text_config)
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
            names.check_tensors(image, _under("image.", expected), "the saved model")
            model.load_state_dict(names.stack(image), strict=False, assign=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    if tokenizer is not None:
        check_tokenizer(tokenizer, config.text_config.vocab_size, name)
    model.tokenizer = tokenizer
    model.freeze_text()
    return model.eval()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_config(path: Path) -> tuple[Path, LMFusionConfig]:
    """Where the model saved at `path` lies, and its configuration. Raises what `LMFusion.from_pretrained` raises."""
    folder = path if path.exists() else _previous(path)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"no saved model at {path}: it holds no {CONFIG_NAME}; `lmfusion adapt` makes one")
    settings = _read_json(folder / CONFIG_NAME)
    if settings.get("model_type") != LMFusionConfig.model_type:
        raise ValueError(
            f"{path} holds a model of type {settings.get('model_type')!r}, not 'lmfusion'; make a model of an LLM with "
            "LMFusion.from_llm or `lmfusion adapt`"
        )
    settings = without_code(settings)
    config = LMFusionConfig(**{key: value for key, value in settings.items() if key != "model_type"})
    if config.codec.path is not None:  # relative: saved along with the model
        config.codec.path = str(folder / config.codec.path)
    return folder, config


def load(
    cls: type["LMFusion"], path: Path, base: str | Path | None = None, dtype: torch.dtype | None = None
) -> "LMFusion":
    """See `LMFusion.from_pretrained`."""
    folder, config = read_config(path)
    saved = _read_json(folder / BASE_NAME)
    parts, base_fields = saved.get("parts"), saved.get("base")
    if parts not in PARTS or (parts == "image" and base_fields is None):
        raise ValueError(f"{folder / BASE_NAME} is damaged: it tells neither base LLM nor parts; copy it again")
    record = None if base_fields is None else from_values(BaseRecord, base_fields, "base")
    tensors = read_safetensors(folder)
    frozen = _under("text.", tensors) | _under("vision.", tensors)
    image = {name: tensor for name, tensor in tensors.items() if name not in frozen}
    if parts == "image":
        assert record is not None
        frozen |= _load_recorded_base(record, base)
    model = _assemble(cls, config, str(folder), frozen, read_tokenizer(folder), image)
    _set_image_processor(model, read_image_processor(folder))
    model.name_or_path = model.config.name_or_path = str(path)
    model.base = record
    if (folder / TRAINING_NAME).exists():
        model.trained = from_values(TrainingRecord, _read_json(folder / TRAINING_NAME), TRAINING_NAME)
    if dtype is not None:
        for part in (model.text, model.image, model.vision):
            if part is not None:
                part.to(dtype)
    return model


def _load_recorded_base(record: BaseRecord, base: str | Path | None) -> dict[str, Tensor]:
    """The tensors of the base, after comparing every digest."""
    path = record.name if base is None else base
    try:
        found = load_base(path, record.torch_dtype)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the model was saved without its base LLM, which is not at {str(path)!r} any more; give its place with "
            f"base= ({error})"
        ) from error
    changed = differing(record.sha256, digests(found.tensors))
    if changed:
        raise ValueError(
            f"the base LLM at {path} is not the one this model was made from: {len(changed)} of {len(record.sha256)} "
            f"tensors differ, first {changed[0]!r}; give the place of the original with base="
        )
    return found.tensors


def differing(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names whose digests differ or that only one side has, in order."""
    return [name for name in {**expected, **found} if expected.get(name) != found.get(name)]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the whole folder of the model again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again from its source") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object; copy it again from its source")
    return value


def save(model: "LMFusion", path: Path, parts: str = "image") -> None:
    """See `LMFusion.save_pretrained`."""
    if parts not in PARTS:
        raise ValueError(f"parts is {parts!r}; it is one of {', '.join(PARTS)}")
    if parts == "image":
        if model.base is None:
            raise ValueError(
                "this model was made without a base LLM, so its text part has no other home; use parts='all'"
            )
        if model.base.may_differ:
            raise ValueError("the text tower has been trainable, so it is no longer the base LLM; use parts='all'")
    _check_not_adapted(model)
    path = path.resolve()
    _check_replaceable(path)
    card = path / CARD_NAME
    # What is no UTF-8, and how lines end, is somebody's matter too
    previous = card.read_bytes().decode("utf-8", errors="surrogateescape") if card.is_file() else None
    _replace(path, lambda folder: _write(model, folder, parts, previous))


def save_text(model: "LMFusion", path: Path) -> None:
    """See `LMFusion.save_text`."""
    _check_not_adapted(model)
    path = path.resolve()
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


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, flush it to the disk, and only then put it in the place of `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.saving-{os.getpid()}")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            write(new)
            mode = (new / CONFIG_NAME).stat().st_mode
            for file in new.glob("*.safetensors"):
                file.chmod(mode)  # safetensors makes them private
            for file in (*new.rglob("*"), new):
                flush(file)
            _swap(new, path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        kept = "; what was saved there before is untouched" if path.exists() else ""
        raise OSError(f"could not save the model to {path}: {error}{kept}") from error


def _check_replaceable(path: Path) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    config = path / CONFIG_NAME
    if not config.is_file() or _read_json(config).get("model_type") != LMFusionConfig.model_type:
        raise ValueError(f"{path} exists and holds no lmfusion model; give the path of a new or an empty folder")


def _write(model: "LMFusion", folder: Path, parts: str, previous_card: str | None) -> None:
    """Everything into the empty `folder`."""
    config = copy.deepcopy(model.config)
    if parts == "all" and config.codec.path is not None:
        for name in ("config.json", WEIGHTS_NAME):
            (folder / CODEC_NAME).mkdir(exist_ok=True)
            shutil.copyfile(Path(config.codec.path) / name, folder / CODEC_NAME / name)
        config.codec.path = CODEC_NAME
    (folder / CONFIG_NAME).write_text(config.to_json_string(), encoding="utf-8")
    origin = {"parts": parts, "base": None if model.base is None else asdict(model.base)}
    (folder / BASE_NAME).write_text(json.dumps(origin, indent=1), encoding="utf-8")
    if model.trained is not None:
        (folder / TRAINING_NAME).write_text(json.dumps(asdict(model.trained), indent=1), encoding="utf-8")
    card = model_card(model, parts, previous_card)
    if card is not None:
        (folder / CARD_NAME).write_bytes(card.encode("utf-8", errors="surrogateescape"))
    _write_tokenizer(model, folder)
    _write_image_processor(model, folder)
    tensors = _file_tensors(model, "image.")
    if parts == "all":
        tensors |= base_tensors(model)
    _write_tensors(tensors, folder)


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


def _previous(path: Path) -> Path:
    """Where the old model lies between the two renames of `_swap`; it stays there if the process dies just then."""
    return path.with_name(f".{path.name}.previous")


def _swap(new: Path, path: Path) -> None:
    """Put the complete folder `new` in the place of `path`, and keep files there that are none of a model's."""
    previous = _previous(path)
    if not path.exists():
        os.rename(new, path)
        flush(path.parent)
    else:
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(path, previous)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(previous, path)
            raise
        flush(path.parent)
    if previous.exists():
        for file in previous.iterdir():
            is_stale = file.name == TRAINING_NAME or (file.name.startswith("model") and ".safetensors" in file.name)
            if not is_stale and not (path / file.name).exists():
                os.rename(file, path / file.name)
        shutil.rmtree(previous)
