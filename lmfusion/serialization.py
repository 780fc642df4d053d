"""How does a model get to disk and back? Safetensors and JSON, and a record of the base LLM with a digest of each tensor.

A saved model is a folder:

    config.json          configuration of the base LLM, image tower, codec and diffusion
    base.json            where the base LLM was, its dtype, the sha256 of each of its tensors, and which parts are saved
    model.safetensors    tensors under `image.`, and under `text.` if all parts are saved (in shards above 4 GB)
    tokenizer files      as transformers writes them
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmfusion.configuration import ImageTowerConfig, LMFusionConfig, config_from
from lmfusion.conversion import BaseModel, load_base, names
from lmfusion.conversion.huggingface import read_safetensors, read_tokenizer
from lmfusion.diffusion import DiffusionConfig
from lmfusion.image.codec import CodecConfig, load_codec
from lmfusion.image.patch_coder import build_patch_coder

if TYPE_CHECKING:
    from lmfusion.modeling import LMFusion

CONFIG_NAME = "config.json"
BASE_NAME = "base.json"
PARTS = ("image", "all")
MAX_SHARD_BYTES = 4 * 10**9


@dataclass
class BaseRecord:
    """The base LLM a model was made from."""

    name: str
    """Absolute path, or name on the hub."""
    dtype: str
    """In which its tensors were hashed, such as "float32"."""
    sha256: dict[str, str]
    """Of each text tensor, by the name a Llama checkpoint gives it."""
    may_differ: bool = False
    """Whether the text tower has been trainable since, so that its tensors may no longer be the base's."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 of the bytes of each text tensor, by the name a Llama checkpoint gives it. `tensors`: by file name."""

    def digest(tensor: Tensor) -> str:
        flat = tensor.detach().cpu().contiguous().flatten()
        return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()

    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter's lock
        return dict(zip(map(names.to_llama, tensors), pool.map(digest, tensors.values()), strict=True))


def text_tensors(model: "LMFusion") -> dict[str, Tensor]:
    """The text tower's tensors by file name."""
    return _file_tensors(model, "text.")


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
    """See `LMFusion.from_llm`. Empties `base.tensors`."""
    config = LMFusionConfig(base.config, image, codec, diffusion)
    return _assemble(cls, config, base.name, base.tensors, base.read_tokenizer(), seed=seed)


def _assemble(
    cls: type["LMFusion"],
    config: LMFusionConfig,
    name: str,
    text: dict[str, Tensor],
    tokenizer: Any,
    image: dict[str, Tensor] | None = None,
    record: BaseRecord | None = None,
    seed: int = 0,
) -> "LMFusion":
    """A model that holds the given tensors themselves (file names; `text` is emptied); without `image` it is drawn.

    record: of the base; None makes one of `text`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = load_codec(config.codec)
        with torch.device("meta"):
            model = cls(config, codec)
        expected = names.split(model.state_dict(), config.text_config)
        names.check_tensors(text, _under("text.", expected), name)
        dtype = text["text.embed_tokens.weight"].dtype
        if record is None:
            record = BaseRecord(name, str(dtype).removeprefix("torch."), digests(text))
        model.load_state_dict(names.stack(text), strict=False, assign=True)
        if image is None:
            tower = model.image.to(dtype).to_empty(device="cpu")
            tower.patch_coder = build_patch_coder(config.image.patch_coder, codec.latent_channels, tower.norm.weight.numel())
            tower.patch_coder.to(dtype)
            tower.initialize(model.text)
        else:
            names.check_tensors(image, _under("image.", expected), "the saved model")
            model.load_state_dict(names.stack(image), strict=False, assign=True)
    model.tokenizer, model.base = tokenizer, record
    model.freeze_text()
    return model.eval()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load(
    cls: type["LMFusion"], path: Path, base: str | Path | None = None, dtype: torch.dtype | None = None
) -> "LMFusion":
    """See `LMFusion.from_pretrained`."""
    folder = path if path.exists() else _previous(path)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"no saved model at {path}: it holds no {CONFIG_NAME}; `lmfusion adapt` makes one")
    settings = _read_json(folder / CONFIG_NAME)
    if settings.get("model_type") != LMFusionConfig.model_type:
        raise ValueError(
            f"{path} holds a model of type {settings.get('model_type')!r}, not 'lmfusion'; make a model of an LLM with "
            "LMFusion.from_llm or `lmfusion adapt`"
        )
    config = LMFusionConfig(**{key: value for key, value in settings.items() if key != "model_type"})
    saved = _read_json(folder / BASE_NAME)
    parts = saved.pop("parts", None)
    if parts not in PARTS:
        raise ValueError(f"{folder / BASE_NAME} has parts {parts!r}; it is one of {', '.join(PARTS)}")
    record = config_from(BaseRecord, saved, BASE_NAME)
    tensors = read_safetensors(folder)
    text = _under("text.", tensors)
    if parts == "image":
        if text:
            raise ValueError(f"{folder} holds text tensors, though {BASE_NAME} says that only the image part was saved")
        text = _load_recorded_base(record, base)
    image = {name: tensor for name, tensor in tensors.items() if name not in text}
    model = _assemble(cls, config, str(folder), text, read_tokenizer(folder), image, record)
    return model if dtype is None else model.to(dtype)


def _load_recorded_base(record: BaseRecord, base: str | Path | None) -> dict[str, Tensor]:
    """The text tensors of the base LLM, after comparing every digest."""
    path = record.name if base is None else base
    try:
        found = load_base(path, record.torch_dtype)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the model was saved without its base LLM, which is not at {str(path)!r} any more; give its place with base= "
            f"({error})"
        ) from error
    changed = differing(record.sha256, digests(found.tensors))
    if changed:
        raise ValueError(
            f"the base LLM at {path} is not the one this model was made from: {len(changed)} of {len(record.sha256)} tensors "
            f"differ, first {changed[0]!r}; give the place of the original with base="
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
            raise ValueError("this model was made without a base LLM, so its text part has no other home; use parts='all'")
        if model.base.may_differ:
            raise ValueError("the text tower has been trainable, so it is no longer the base LLM; use parts='all'")
    path = path.resolve()
    _check_replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            _write(model, new, parts)
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


def _write(model: "LMFusion", folder: Path, parts: str) -> None:
    """Everything, flushed to the disk, into the empty `folder`."""
    model.config.architectures = [type(model).__name__]
    (folder / CONFIG_NAME).write_text(model.config.to_json_string(), encoding="utf-8")
    if model.base is not None:
        text = json.dumps({**asdict(model.base), "parts": parts}, indent=1)
        (folder / BASE_NAME).write_text(text, encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    tensors = _file_tensors(model, "image.")
    if parts == "all":
        tensors |= _file_tensors(model, "text.")
    _write_tensors(tensors, folder)
    folder.chmod(0o755)  # mkdtemp made it private
    for file in (*folder.rglob("*"), folder):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
    """Where the old model lies between the two renames of `_swap`; it stays there only if the process dies just then."""
    return path.with_name(f".{path.name}.previous")


def _swap(new: Path, path: Path) -> None:
    """Put the complete folder `new` in the place of `path`, and keep files there that are none of a model's."""
    previous = _previous(path)
    if not path.exists():
        os.rename(new, path)
    else:
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(path, previous)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(previous, path)
            raise
    if previous.exists():
        for file in previous.iterdir():
            is_stale = file.name.startswith("model") and ".safetensors" in file.name
            if not is_stale and not (path / file.name).exists():
                os.rename(file, path / file.name)
        shutil.rmtree(previous)
