"""Latent caches: training from one sees what training from images sees, and one made otherwise is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lmfusion.cli import main
from lmfusion.data import SourceConfig, load_source
from lmfusion.data.latent_cache.format import tokenizer_sha256
from lmfusion.data.latent_cache.reader import LatentShards
from lmfusion.images.preprocessing import to_tensor
from lmfusion.model.codec import CodecConfig, load_codec
from lmfusion.training.config import RunConfig
from lmfusion.training.trainer import Trainer
from lmfusion.utils.config_values import from_values
from tests.lmfusion.data.latent_cache.caches import (
    SIZE,
    assert_same_steps,
    encode,
    encoded,
    loader,
    read,
    save_autoencoder,
    write_folder,
    write_interleaved,
)
from tests.lmfusion.training.runs import read_metrics

PIXELS = CodecConfig(image_size=SIZE)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("vae"), scaling_factor=0.25, shift_factor=0.5)


def test_sequences_of_several_epochs_are_those_of_the_images(tmp_path, tokenizer, autoencoder):
    source = write_folder(tmp_path / "images")
    manifest = encode(source, tmp_path / "cache", autoencoder, tokenizer)
    assert manifest["num_damaged"] == 2 and len(manifest["shards"]) == 5
    direct = read(loader([source], autoencoder, tokenizer), 40)
    assert direct[-1].epoch > 3  # every caption of a sample has had its turn
    cached = read(loader([encoded(tmp_path / "cache")], autoencoder, tokenizer), 40)
    assert_same_steps(direct, cached)
    reasons = "\n".join(damage.reason for step in direct for damage in step.damaged)
    assert "004.png is damaged or truncated" in reasons and "009.png: no caption" in reasons


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_mixture_with_documents_in_blocks(tmp_path, tokenizer, autoencoder, num_workers):
    images, pages = write_folder(tmp_path / "images", num=17), write_interleaved(tmp_path / "pages")
    for i, source in enumerate((images, pages)):
        encode(source, tmp_path / f"cache/{i}", autoencoder, tokenizer, shard_samples=5, num_workers=2)
    mixed = [replace(images, weight=2.0), pages]
    caches = [encoded(tmp_path / "cache/0", weight=2.0), encoded(tmp_path / "cache/1")]
    options = {"shuffle_blocks": 1, "num_workers": num_workers}
    direct = read(loader(mixed, autoencoder, tokenizer, **options), 25)
    assert any(row.num_images > len(row.sample_ids) for step in direct for row in step.batches)
    assert_same_steps(direct, read(loader(caches, autoencoder, tokenizer, **options), 25))


def test_sources_keep_their_blocks_ids_and_texts(tmp_path, tokenizer):
    source = write_interleaved(tmp_path / "pages")
    (tmp_path / "pages/second.jsonl").write_text('{"content": ["only text"]}\n')
    source = replace(source, path=str(tmp_path / "pages/*.jsonl"))
    encode(source, tmp_path / "cache", PIXELS, tokenizer)
    original, cache = load_source(source, SIZE), LatentShards(tmp_path / "cache")
    assert list(cache.blocks) == list(original.blocks) and len(cache) == len(original) == 13
    for i in (0, 3, 12):
        assert cache[i].sample_id == original[i].sample_id
        texts = [part for part in cache[i].parts if isinstance(part, np.ndarray)]
        expected = [part for part in original[i].parts if isinstance(part, str)]
        assert [tokenizer.decode(text) for text in texts] == [text.strip() for text in expected]
    with pytest.raises(ValueError, match="line 9") as now:
        cache[8]
    with pytest.raises(ValueError, match="line 9") as then:
        original[8]
    assert str(now.value) == str(then.value)
    with pytest.raises(IndexError):
        cache[13]


def test_images_around_a_missing_one_are_their_own(tmp_path, tokenizer):
    source = write_interleaved(tmp_path / "pages")
    encode(source, tmp_path / "cache", PIXELS, tokenizer)
    codec = load_codec(PIXELS)
    for index in (6, 7):
        pairs = zip(load_source(source, SIZE)[index].parts, LatentShards(tmp_path / "cache")[index].parts, strict=True)
        images = [(image, latents) for image, latents in pairs if callable(image)]
        assert len(images) == 3
        for i, (image, latents) in enumerate(images):
            if (index, i) == (6, 1):
                with pytest.raises(ValueError, match=r"missing\.png"):
                    latents()
            else:
                assert torch.equal(latents().mean, codec.encode(to_tensor(image(), SIZE)[None])[0])


def test_texts_that_no_tokenizer_reads_are_left_out_too(tmp_path, tokenizer, monkeypatch):
    class Odd:
        blocks = (3,)

        def __len__(self):
            return 3

        def __getitem__(self, index):
            sample = load_source(SourceConfig("digits"), SIZE)[index]
            return sample._replace(captions=((" ",), ("half \ud83d",), ("a digit", ""))[index])

    monkeypatch.setattr("lmfusion.data.latent_cache.encode.load_source", lambda config, size: Odd())
    codec = CodecConfig(channels=1, image_size=SIZE)
    encode(SourceConfig("digits"), tmp_path / "cache", codec, tokenizer)
    cached = read(loader([encoded(tmp_path / "cache")], codec, tokenizer), 12)
    monkeypatch.setattr("lmfusion.data.pipeline.loader.load_source", lambda config, size: Odd())
    direct = read(loader([SourceConfig("digits")], codec, tokenizer), 12)
    short = [
        [replace(step, damaged=tuple(d._replace(reason=d.reason[:20]) for d in step.damaged)) for step in steps]
        for steps in (direct, cached)
    ]
    assert_same_steps(*short)
    assert {d.reason[:13] for step in direct for d in step.damaged} == {"the caption i", "a text is not"}


def test_variance_draws_what_the_images_draw(tmp_path, tokenizer, autoencoder):
    source = write_folder(tmp_path / "images", damaged=())
    encode(source, tmp_path / "cache", autoencoder, tokenizer, keep_std=True)
    direct = read(loader([source], autoencoder, tokenizer, sample_latents=True), 10)
    assert_same_steps(
        direct, read(loader([encoded(tmp_path / "cache")], autoencoder, tokenizer, sample_latents=True), 10)
    )
    mean = read(loader([encoded(tmp_path / "cache")], autoencoder, tokenizer), 1)
    assert not torch.equal(mean[0].batches[0].latents, direct[0].batches[0].latents)


def test_without_variance_no_latents_are_sampled(tmp_path, tokenizer, autoencoder):
    encode(write_folder(tmp_path / "images"), tmp_path / "cache", autoencoder, tokenizer)
    with pytest.raises(ValueError, match="--variance"):
        read(loader([encoded(tmp_path / "cache")], autoencoder, tokenizer, sample_latents=True), 1)
    with pytest.raises(ValueError, match="codec with a posterior, got 'pixels'"):
        encode(SourceConfig("digits"), tmp_path / "other", PIXELS, tokenizer, keep_std=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_half_precision_is_close(tmp_path, tokenizer, autoencoder, dtype, tolerance):
    source = write_folder(tmp_path / "images", damaged=())
    for name in ("float32", dtype):
        encode(source, tmp_path / name, autoencoder, tokenizer, dtype=name, keep_std=True)
    whole, half = LatentShards(tmp_path / "float32"), LatentShards(tmp_path / dtype)
    for i in range(len(whole)):
        for x, y in zip(whole[i].load_image(), half[i].load_image(), strict=True):
            assert y.dtype == torch.float32
            assert torch.equal(y, x.to(getattr(torch, dtype)).float())
            torch.testing.assert_close(y, x, rtol=tolerance, atol=1e-4)
    sizes = [sum(shard["size"] for shard in cache.manifest["shards"]) for cache in (whole, half)]
    assert sizes[0] - sizes[1] == 30 * 2 * whole[0].load_image().mean.numel() * 2  # images, mean and std, 2 bytes


def test_images_in_batches_are_close(tmp_path, tokenizer, autoencoder):
    source = write_folder(tmp_path / "images")
    for size in (1, 4):
        encode(source, tmp_path / str(size), autoencoder, tokenizer, batch_size=size)
    one, four = LatentShards(tmp_path / "1"), LatentShards(tmp_path / "4")
    for i in (0, 6, 7, 29):
        torch.testing.assert_close(four[i].load_image().mean, one[i].load_image().mean)


def test_latents_that_a_dtype_cannot_hold_are_named(tmp_path, tokenizer):
    codec = save_autoencoder(tmp_path / "vae", scaling_factor=1e7)
    source = write_folder(tmp_path / "images", damaged=())
    with pytest.raises(ValueError, match=r"latents of sample 000\.png must be finite as float16"):
        encode(source, tmp_path / "cache", codec, tokenizer, dtype="float16")
    encode(source, tmp_path / "bfloat16", codec, tokenizer, dtype="bfloat16")


def test_another_codec_is_refused(tmp_path, tokenizer, autoencoder):
    source = write_folder(tmp_path / "images", damaged=())
    cache = [encoded(tmp_path / "cache")]
    encode(source, tmp_path / "cache", autoencoder, tokenizer)
    rescaled = save_autoencoder(tmp_path / "rescaled", scaling_factor=0.3, shift_factor=0.5)
    for codec, message in (
        (replace(autoencoder, image_size=16), "codec.image_size must be 16, got 8"),
        (PIXELS, "codec.kind must be 'pixels', got 'autoencoder_kl'"),
        (rescaled, "codec.settings_sha256 must be "),  # the same weights
    ):
        with pytest.raises(ValueError, match=message):
            loader(cache, codec, tokenizer)
    moved = tmp_path / "moved"
    Path(autoencoder.path).rename(moved)
    loader(cache, replace(autoencoder, path=str(moved)), tokenizer)
    moved.rename(autoencoder.path)


def test_another_tokenizer_or_preprocessing_is_refused(tmp_path, tokenizer, monkeypatch):
    encode(write_folder(tmp_path / "images"), tmp_path / "cache", PIXELS, tokenizer)
    cache = LatentShards(tmp_path / "cache")
    cache.check_made_with(load_codec(PIXELS), tokenizer)
    other = type(tokenizer).from_pretrained(save(tokenizer, tmp_path / "tokenizer"))
    cache.check_made_with(load_codec(PIXELS), other)  # saved and read back it is the same
    other(["a", "bcd"], padding=False, truncation=True, max_length=2)  # leaves traces in its backend
    assert tokenizer_sha256(other) == tokenizer_sha256(tokenizer)
    other.add_tokens(["image"])
    with pytest.raises(ValueError, match="tokenizer_sha256 must be "):
        cache.check_made_with(load_codec(PIXELS), other)
    nearest = lambda source, size, channels=3: torch.zeros(channels, size, size)  # noqa: E731
    monkeypatch.setattr("lmfusion.data.latent_cache.format.to_tensor", nearest)
    with pytest.raises(ValueError, match="preprocessing_sha256 must be "):
        cache.check_made_with(load_codec(PIXELS), tokenizer)


def save(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_too_much_damage_stops(tmp_path, tokenizer):
    source = write_folder(tmp_path / "images")
    with pytest.raises(ValueError, match=r"at most data\.max_damaged, 0, got 1 of 5 samples.*000?4\.png"):
        encode(source, tmp_path / "cache", PIXELS, tokenizer, max_damaged=0.0)
    assert not list((tmp_path / "cache").glob("shard*"))


def test_a_folder_with_something_else_is_left_alone(tmp_path, tokenizer):
    source = write_folder(tmp_path / "images", num=6, damaged=())
    with pytest.raises(ValueError, match=r"must be empty, but .* holds 000\.png"):
        encode(source, tmp_path / "images", PIXELS, tokenizer)
    encode(source, tmp_path / "cache", PIXELS, tokenizer)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    for options, message in (
        ({"dtype": "float16"}, "dtype must be 'float16', got 'float32'"),
        ({"shard_samples": 3}, "shard_samples must be 3, got 7"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(source, tmp_path / "cache", PIXELS, tokenizer, **options)
    with pytest.raises(
        ValueError, match=r"source\.kind must be 'digits', got 'folder'.*num_samples must be 14\d*, got 6"
    ):
        encode(SourceConfig("digits"), tmp_path / "cache", PIXELS, tokenizer)
    with pytest.raises(ValueError, match=r"must hold images, but .* is a latent cache"):
        encode(encoded(tmp_path / "cache"), tmp_path / "again", PIXELS, tokenizer)
    (tmp_path / "images").rename(tmp_path / "moved")
    encode(replace(source, path=str(tmp_path / "moved")), tmp_path / "cache", PIXELS, tokenizer)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}


@pytest.mark.parametrize(
    "options", [{"shard_samples": 0}, {"dtype": "int8"}, {"num_workers": 0}, {"batch_size": 0}], ids=str
)
def test_wrong_options_are_named(tmp_path, tokenizer, options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        encode(SourceConfig("digits"), tmp_path, PIXELS, tokenizer, **options)


def recipe(folder, tiny_llama, sources):
    values = {
        "output": str(folder / "run"),
        "model": {"base": str(tiny_llama), "codec": {"kind": "pixels", "channels": 3, "image_size": SIZE}},
        "data": {"sources": sources},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "recipe.yaml")


def test_command(tmp_path, tiny_llama, tokenizer, capsys):
    """Encodes what the recipe names, and says how to train on it."""
    images, pages = write_folder(tmp_path / "images"), write_interleaved(tmp_path / "pages")
    sources = [{"kind": source.kind, "path": source.path} for source in (images, pages)]
    path = recipe(tmp_path, tiny_llama, sources)
    assert main(["encode", path, str(tmp_path / "cache"), "--shard-samples", "8", "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "30 samples, 29 images" in printed and "2 samples are damaged" in printed
    assert f"{{kind: latents, path: {tmp_path}/cache/1, weight: 1}}" in printed
    direct = read(loader([images, pages], PIXELS, tokenizer), 10)
    cached = read(loader([encoded(tmp_path / f"cache/{i}") for i in (0, 1)], PIXELS, tokenizer), 10)
    assert_same_steps(direct, cached)
    assert main(["encode", recipe(tmp_path, tiny_llama, sources[:1]), str(tmp_path / "one"), "--dtype", "float16"]) == 0
    assert json.loads((tmp_path / "one/manifest.json").read_text())["plan"]["dtype"] == "float16"
    assert main(["encode", path, str(tmp_path / "none"), "--variance"]) == 2
    assert "codec with a posterior" in capsys.readouterr().err


@pytest.mark.parametrize("sample_latents", [False, True])
def test_training_gives_the_same_numbers(tmp_path, tiny_llama, tokenizer, autoencoder, sample_latents):
    source = write_folder(tmp_path / "images")
    encode(source, tmp_path / "cache", autoencoder, tokenizer, keep_std=sample_latents)
    metrics = []
    for kind, path in (("folder", source.path), ("latents", tmp_path / "cache")):
        values = {
            "output": str(tmp_path / f"run-{kind}"),
            "model": {
                "base": str(tiny_llama),
                "image": {"hidden_size": 16, "patch_coder": {"kind": "linear", "patch_size": 2}},
                "codec": {"kind": "autoencoder_kl", "path": autoencoder.path, "image_size": SIZE},
            },
            "data": {
                "sources": [{"kind": kind, "path": str(path)}],
                "seq_len": 128,
                "pack_window": 20,
                "sample_latents": sample_latents,
            },
            "train": {"num_steps": 8, "batch_tokens": 256, "warmup_steps": 2, "log_every": 1},
        }
        config = from_values(RunConfig, values)
        assert Trainer(config).run()
        metrics.append(read_metrics(config))
    assert len(metrics[0]) == 8 and metrics[0][-1]["num_damaged"] > 0
    assert metrics[0] == metrics[1]
