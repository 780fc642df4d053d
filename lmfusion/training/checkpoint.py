"""How does a run survive? Checkpoints that are complete or not there: hashed safetensors and JSON, placed by a rename.

<run>/checkpoints/step-00001000/
    weights.safetensors, optimizer.safetensors, ema.safetensors    what is trained, nothing of the base model
    state.json                                                     integers and what they belong to
    manifest.json                                                  size and sha256 of each; written last
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmfusion.files import flush

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1

Parts = Mapping[str, Mapping[str, Tensor]]


def save_checkpoint(folder: Path, step: int, parts: Parts, state: Mapping[str, Any], keep_last: int) -> Path:
    """Write the tensors of `parts` and the JSON values of `state` as the checkpoint of `step`.

    Older checkpoints beyond `keep_last` are deleted once this one is complete and on the disk. Raises OSError where it
    cannot be written (a full disk, say); checkpoints that were there still are. A complete checkpoint of `step` is left
    as it is.
    """
    target = checkpoint_path(folder, step)
    if step in list_steps(folder):
        return target
    unfinished = target.with_suffix(".tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        manifest: dict[str, Any] = {"format": FORMAT, "files": {}}
        for name, tensors in parts.items():
            held = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            file = f"{name}.safetensors"
            manifest["files"][file] = _write(unfinished / file, partial(save_file, held))
        manifest["files"][STATE] = _write(unfinished / STATE, partial(_write_json, {**state, "step": step}))
        _write(unfinished / MANIFEST, partial(_write_json, manifest))
        flush(unfinished)
        unfinished.rename(target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        steps = list_steps(folder)
        kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier one"
        raise OSError(f"cannot write {target}: {error}; {kept}. Make room and run the same command again") from error
    for old in list_steps(folder)[:-keep_last]:
        shutil.rmtree(checkpoint_path(folder, old))
    return target


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Parts and state of the checkpoint at `path`, on the CPU.

    Every file is compared with the manifest first. Raises ValueError, naming the file, for one that is missing, damaged
    or of another format.
    """
    manifest = _read_json(path / MANIFEST, path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r}; this version of lmfusion reads {FORMAT}")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["size"] or _sha256(file) != expected["sha256"]:
            raise _damaged(file, path)
        if name != STATE:
            parts[file.stem] = load_file(file)
    return parts, _read_json(path / STATE, path)


def list_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint in `folder`, ascending."""
    if not folder.is_dir():
        return []
    names = [p.name for p in folder.iterdir() if p.name.startswith("step-") and (p / MANIFEST).is_file()]
    return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _write(path: Path, write: Callable[[Path], Any]) -> dict[str, Any]:
    """Let `write` make the file at `path`, force it onto the disk, and answer with its size and sha256."""
    write(path)
    flush(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _write_json(values: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _read_json(file: Path, checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError):
        raise _damaged(file, checkpoint) from None


def _damaged(file: Path, checkpoint: Path) -> ValueError:
    return ValueError(f"{file} is damaged or missing; delete {checkpoint} to resume from the checkpoint before it")
