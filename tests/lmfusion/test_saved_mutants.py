"""Wrong values in the files of a saved model: each gives a model that works, or one error that names the file."""

import copy
import json
import shutil
import time

import pytest
import torch

from lmfusion.modeling import LMFusion
from tests.lmfusion.vlms import build, save_vlm

IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}
WRONG = (None, True, 0, -1, 7, 10**9, 10**30, 0.5, 1e300, "", "load", "é" * 1000, [], [1, 2], [None], {}, {"a": 1})


@pytest.fixture(scope="module")
def saved(tiny_llama, tmp_path_factory):
    """A model saved as its image part, and whole."""
    folder = tmp_path_factory.mktemp("mutants")
    model = LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC)
    model.save_pretrained(folder / "image")
    model.save_pretrained(folder / "all", parts="all")
    return folder


def paths_of(values, prefix=()):
    """Every key of nested JSON values; of the digests of tensors one is enough."""
    keys = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(keys)[: 1 if prefix[-1:] == ("sha256",) else None]:
        yield (*prefix, key)
        yield from paths_of(value, (*prefix, key))


def mutants(values):
    """(key, changed values): each key with each wrong value, and without it."""
    for path in paths_of(values):
        for wrong in (*WRONG, KeyError):
            changed = copy.deepcopy(values)
            *parents, last = path
            place = changed
            for key in parents:
                place = place[key]
            if wrong is KeyError:
                del place[last]
            else:
                place[last] = wrong
            yield f"{'.'.join(map(str, path))} = {wrong!r:.40}", changed


def check_works(model):
    """Text and an image go through it, and everything is finite."""
    ids = torch.arange(4)[None]
    with torch.inference_mode():
        assert model(input_ids=ids).logits.isfinite().all()
        if model.config.text_config.max_position_embeddings > 16:
            images = model.draw(["a"], num_steps=1)
            assert images[0].size[0] == model.codec.config.image_size


def failures_of(folder, name, is_tried=lambda what: True):
    """What goes wrong with the mutants of a file of the model in `folder`."""
    file = folder / name
    values = json.loads(file.read_text())
    failures = []
    for what, changed in mutants(values):
        if not is_tried(what):
            continue
        file.write_text(json.dumps(changed))
        start = time.monotonic()
        try:
            check_works(LMFusion.from_pretrained(folder))
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            if str(folder) not in message and "the base LLM of this model is not at" not in message:
                failures.append(f"{what}: does not name the file: {message[:200]}")
            if len(message) > 1000:
                failures.append(f"{what}: an error of {len(message)} characters: {message[:100]}")
        except Exception as error:
            failures.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        if time.monotonic() - start > 10:
            failures.append(f"{what}: {time.monotonic() - start:.0f} s")
    file.write_text(json.dumps(values))
    return failures


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["image", "all"])
@pytest.mark.parametrize("name", ["config.json", "base.json"])
def test_every_mutant_works_or_is_refused(saved, tmp_path, parts, name):
    folder = shutil.copytree(saved / parts, tmp_path / "m")
    failures = failures_of(folder, name)
    assert not failures, f"{len(failures)}\n" + "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "llm", "encoder"), [("llava_next", "qwen2", "siglip"), ("llava", "llama", "clip")])
def test_every_mutant_of_a_vision_language_model(tmp_path, kind, llm, encoder):
    save_vlm(tmp_path / "vlm", kind, llm, encoder)
    build(tmp_path / "vlm").save_pretrained(tmp_path / "m", parts="all")
    failures = failures_of(tmp_path / "m", "config.json", lambda what: what.startswith(("vlm_config", "text_config")))
    assert not failures, f"{len(failures)}\n" + "\n".join(failures)
