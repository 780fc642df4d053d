"""Damaged latent caches: every change on the disk is named or counted, none is trained on, nothing crashes."""

import json
import random
import shutil

import pytest
import torch

from lmfusion.data.latent_cache.reader import LatentShards
from lmfusion.model.codec import CodecConfig
from tests.lmfusion.data.latent_cache.caches import SIZE, encode, encoded, loader, read, write_folder

PIXELS = CodecConfig(image_size=SIZE)
NUM_CASES = 300


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("cache")
    encode(
        write_folder(folder / "images", num=12, damaged=(3, 7)), folder / "cache", PIXELS, tokenizer, shard_samples=5
    )
    return folder / "cache"


def samples_of(source):
    """Of each sample its id, captions and latents, or why it or its image cannot be read."""
    found = []
    for index in range(len(source)):
        try:
            sample_id, load_image, captions = source[index]
            found.append((sample_id, load_image().mean.numpy().tobytes(), *(ids.tobytes() for ids in captions)))
        except ValueError as error:
            found.append(str(error))
    return found


def damage(folder, chance):
    """Do one random harm to one random file; answers with its name and what was done."""
    path = chance.choice(sorted(path for path in folder.iterdir() if path.name != ".lock"))
    data = bytearray(path.read_bytes())
    at = chance.randrange(min(len(data), chance.choice([8, 2000, len(data)])))  # headers are small, and matter
    kind = chance.choice(["truncate", "flip", "overwrite", "zeros", "append", "delete", "empty", "swap", "foreign"])
    if kind == "truncate":
        del data[at:]
    elif kind == "flip":
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "overwrite":
        data[at : at + 9] = chance.randbytes(9)
    elif kind == "zeros":
        data[at : at + 40] = bytes(len(data[at : at + 40]))
    elif kind == "append":
        data += chance.randbytes(3)
    elif kind == "empty":
        data.clear()
    elif kind == "foreign":
        data[:] = b"\x89PNG\r\n\x1a\n" + chance.randbytes(len(data) - 8)
    if kind == "delete":
        path.unlink()
    elif kind == "swap":
        other = chance.choice([p for p in folder.iterdir() if p.suffix == ".safetensors" and p != path])
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(data)
    return path.name, kind


def test_300_damaged_caches(cache, tmp_path):
    original = samples_of(LatentShards(cache))
    assert sum(isinstance(sample, str) for sample in original) == 2
    outcomes = {"refused": 0, "counted": 0, "harmless": 0}
    for case in range(NUM_CASES):
        folder = tmp_path / str(case)
        shutil.copytree(cache, folder)
        name, kind = damage(folder, random.Random(case))
        is_same = {p.name: p.read_bytes() for p in folder.iterdir()} == {
            p.name: p.read_bytes() for p in cache.iterdir()
        }
        error = None
        try:
            source = LatentShards(folder)
        except ValueError as raised:
            error = str(raised)
        if error is not None:
            assert name in error and not is_same, (case, name, kind, error)
            outcomes["refused"] += 1
            continue
        found = samples_of(source)
        changed = [now for now, then in zip(found, original, strict=True) if now != then]
        assert all(isinstance(now, str) and name in now for now in changed), (case, name, kind)
        outcomes["counted" if changed else "harmless"] += 1
        shutil.rmtree(folder)
    assert outcomes["refused"] > 100 and outcomes["counted"] > 50, outcomes
    assert outcomes["harmless"] < 15, outcomes  # a change that changes nothing, such as zeros over zeros


def flip(path, name, byte=0):
    """One bit of a tensor's data."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + size])[name]["data_offsets"][0]
    data[8 + size + start + byte] ^= 16
    path.write_bytes(data)


def test_a_damaged_image_is_left_out_and_the_rest_is_trained_on(cache, tmp_path, tokenizer):
    shutil.copytree(cache, tmp_path / "cache")
    flip(tmp_path / "cache/shard-00000001.safetensors", "mean")
    whole = read(loader([encoded(cache)], PIXELS, tokenizer, seq_len=256), 3)
    steps = read(loader([encoded(tmp_path / "cache")], PIXELS, tokenizer, seq_len=256), 3)
    lost = {d.sample_id: d.reason for step in steps for d in step.damaged if "was written" in d.reason}
    assert list(lost) == ["005.png"] and "the latents of sample 5 are not what was written" in lost["005.png"]
    for now, was in zip(steps, whole, strict=True):
        kept = [sample_id for row in was.batches for sample_id in row.sample_ids if sample_id != "005.png"]
        assert [sample_id for row in now.batches for sample_id in row.sample_ids] == kept


@pytest.mark.parametrize("name", ["token_ids", "first_token", "parts", "kinds", "sample_ids", "checksums"])
def test_a_damaged_table_spoils_its_shard_alone(cache, tmp_path, name):
    shutil.copytree(cache, tmp_path / "cache")
    flip(tmp_path / "cache/shard-00000001.safetensors", name)
    found = samples_of(LatentShards(tmp_path / "cache"))
    assert all("shard-00000001.safetensors is damaged: its tables" in sample for sample in found[5:10])
    assert found[:5] + found[10:] == (original := samples_of(LatentShards(cache)))[:5] + original[10:]


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"more", lambda data: b""])
def test_a_shard_of_another_size_is_refused(cache, tmp_path, change):
    shutil.copytree(cache, tmp_path / "cache")
    path = tmp_path / "cache/shard-00000002.safetensors"
    data = path.read_bytes()
    path.write_bytes(change(data))
    with pytest.raises(
        ValueError, match=rf"{path.name} is damaged: it must have {len(data)} bytes, got {len(change(data))}"
    ):
        LatentShards(tmp_path / "cache")
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: it is missing; copy it again"):
        LatentShards(tmp_path / "cache")


def test_an_unfinished_cache_is_named(cache, tmp_path):
    with pytest.raises(ValueError, match=r"must be a finished latent cache.*lmfusion encode"):
        LatentShards(tmp_path)
    shutil.copytree(cache, tmp_path / "cache")
    manifest = json.loads((cache / "manifest.json").read_text())
    (tmp_path / "cache/manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ValueError, match="must be 1, got 2"):
        LatentShards(tmp_path / "cache")
    (tmp_path / "cache/manifest.json").write_text(json.dumps({**manifest, "num_images": 99}))
    with pytest.raises(ValueError, match="do not have the sha256"):
        LatentShards(tmp_path / "cache")


def test_what_is_read_can_be_changed(cache):
    """A trainer that writes into its tensors does not write into the cache."""
    source = LatentShards(cache)
    source[0].load_image().mean.zero_()
    source[0].captions[0][:] = 0
    assert source[0].load_image().mean.any() and torch.equal(
        source[0].load_image().mean, LatentShards(cache)[0].load_image().mean
    )
    assert source[0].captions[0].any()
