"""Each step gets the right images, whatever the workers, the cache and damaged files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lmfusion.images.preprocessing import to_tensor
from lmfusion.utils.config_values import from_values
from lmfusion.vae.config import AutoencoderConfig, ImageDataConfig
from lmfusion.vae.images import ImageLoader

CONFIG = AutoencoderConfig(
    channels=1, image_size=8, latent_channels=2, block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2
)


def loader(*sources, seed=0, config=CONFIG, **data):
    return ImageLoader(from_values(ImageDataConfig, {"sources": list(sources), **data}), config, seed)


def write_image(path, value, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size[::-1], value, np.uint8)).save(path)


def assert_same(one, other):
    assert [batch.sample_ids for batch in one] == [batch.sample_ids for batch in other]
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.noise, b.noise)


def test_each_epoch_has_every_image_once_in_a_new_order():
    digits = loader({"kind": "digits", "split": "test"})
    num = digits.num_samples
    epochs = [
        [sample_id for batch in digits.batches(e * num, (e + 1) * num, 50) for sample_id in batch.sample_ids]
        for e in (0, 1)
    ]
    assert len(set(epochs[0])) == num == 359
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


def test_images_are_those_of_the_codec_and_noise_is_new_each_epoch():
    digits = loader({"kind": "digits", "split": "test"})
    (first,), (second,) = (list(digits.batches(e * 359, (e + 1) * 359, 359)) for e in (0, 1))
    assert first.images.shape == (359, 1, 8, 8) and first.noise.shape == (359, 2, 4, 4)
    sample = next(s for s in (digits._sources[0][i] for i in range(359)) if s.sample_id == first.sample_ids[0])
    assert torch.equal(first.images[0], to_tensor(sample.load_image(), 8, 1))
    again = second.sample_ids.index(first.sample_ids[0])
    assert torch.equal(first.images[0], second.images[again])
    assert not torch.equal(first.noise[0], second.noise[again])
    assert abs(first.noise.mean()) < 0.05 and abs(first.noise.std() - 1) < 0.05


def test_workers_cache_and_batches_change_nothing():
    source = {"kind": "digits"}
    plain = list(loader(source, cache_megabytes=0).batches(0, 60, 7))
    assert [len(batch.sample_ids) for batch in plain] == [7] * 8 + [4]
    assert_same(plain, list(loader(source, num_workers=4).batches(0, 60, 7)))
    cached = loader(source)
    assert_same(list(cached.batches(0, 60, 7)), list(cached.batches(0, 60, 7)))
    assert_same(plain[3:], list(loader(source).batches(21, 60, 7)))
    other = list(loader(source, seed=1).batches(0, 60, 7))
    assert [batch.sample_ids for batch in plain] != [batch.sample_ids for batch in other]


def test_a_folder_needs_no_captions_and_damaged_images_are_skipped(tmp_path):
    for i in range(5):
        write_image(tmp_path / "deep" / f"{i}.png", 50 * i)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image either")
    folder = loader({"kind": "folder", "path": str(tmp_path)})
    assert folder.num_samples == 6
    (batch,) = folder.batches(0, 6, 6)
    assert sorted(batch.sample_ids) == [f"deep/{i}.png" for i in range(5)]
    assert sorted(batch.images.mean((1, 2, 3)).tolist()) == pytest.approx([50 * i / 127.5 - 1 for i in range(5)])
    ((sample_id, reason),) = batch.damaged
    assert sample_id == "broken.jpg" and "broken.jpg is not an image of a known format" in reason


def test_a_batch_may_be_damaged_as_a_whole(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (batch,) = loader({"kind": "folder", "path": str(tmp_path)}).batches(0, 1, 1)
    assert batch.images.shape == (0, 1, 8, 8) and batch.noise.shape == (0, 2, 4, 4)
    assert batch.sample_ids == () and len(batch.damaged) == 1


def test_sources_are_mixed_by_weight(tmp_path):
    write_image(tmp_path / "mine.png", 0)
    mixed = loader({"kind": "digits", "weight": 3}, {"kind": "folder", "path": str(tmp_path), "weight": 1})
    ids = [sample_id for batch in mixed.batches(0, 1000, 100) for sample_id in batch.sample_ids]
    assert ids.count("mine.png") == 250


def test_each_epoch_chooses_one_image_of_a_document(tmp_path):
    write_image(tmp_path / "black.png", 0)
    write_image(tmp_path / "white.png", 255)
    content = ["from", {"image": "black.png"}, "to", {"image": "white.png"}]
    (tmp_path / "stories.jsonl").write_text(json.dumps({"id": "story", "content": content}) + "\n")
    stories = loader({"kind": "interleaved", "path": str(tmp_path / "stories.jsonl")})
    values = torch.cat([batch.images for batch in stories.batches(0, 40, 8)]).mean((1, 2, 3)).tolist()
    assert set(values) == {-1.0, 1.0} and 8 <= values.count(1.0) <= 32


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "latents", "path": "cache"}, "latents cache must hold images, got latents"),
        ({"kind": "folder", "path": "nowhere"}, "there must be a folder of images at nowhere"),
    ],
)
def test_sources_without_images_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        loader(source)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have samples, got none"):
        loader({"kind": "folder", "path": str(tmp_path)})
