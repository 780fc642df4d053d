"""What the tests of latent caches share: small data sets with damage in them, caches of them, and batches of both."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lmfusion.data import DataConfig, SourceConfig
from lmfusion.data.latent_cache.encode import EncodeOptions, encode_source
from lmfusion.data.pipeline.loader import LoaderState, PackedLoader
from lmfusion.model.batch import SpecialTokens
from lmfusion.model.codec import CodecConfig, load_codec
from lmfusion.model.diffusion import DiffusionConfig

SIZE = 8
TENSORS = ("token_ids", "labels", "latents", "noise", "timesteps", "boi_target_indices", "boi_labels")


def save_autoencoder(folder, **settings):
    """A random AutoencoderKL that halves the sides once."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        **settings,
    ).save_pretrained(folder)
    return CodecConfig("autoencoder_kl", path=str(folder), image_size=SIZE)


def write_folder(folder, num=30, damaged=(4, 9), seed=0):
    """Images of odd sizes with one to three captions each; a truncated one, and one without caption."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(num):
        path = folder / f"{i:03d}.png"
        Image.fromarray(draw.integers(0, 256, (10 + i, 12, 3), dtype=np.uint8)).save(path)
        captions = [f"image {i} as {word}" + " very" * (i % 7) for word in ("it is", "seen", "told")[: 1 + i % 3]]
        path.with_suffix(".txt").write_text("\n".join(captions))
    if damaged:
        truncated, bare = damaged
        path = folder / f"{truncated:03d}.png"
        path.write_bytes(path.read_bytes()[:-200])
        (folder / f"{bare:03d}.txt").unlink()
    return SourceConfig("folder", path=str(folder))


def write_interleaved(folder, num=12):
    """Documents of texts and images; one with a missing image, one line that is none."""
    draw = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for i in range(5):
        Image.fromarray(draw.integers(0, 256, (9, 9 + i, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    lines = []
    for i in range(num):
        images = [{"image": f"{(i + j) % 5}.png"} for j in range(i % 4)]
        if i == 6:
            images.insert(1, {"image": "missing.png"})
        lines.append(json.dumps({"id": f"page {i}", "content": [f"before {i}", *images, " and after ", "more" * i]}))
    lines[8] = lines[8][:20]
    (folder / "pages.jsonl").write_text("\n".join(lines))
    return SourceConfig("interleaved", path=str(folder / "pages.jsonl"))


def encode(source, folder, codec_config, tokenizer, **options):
    return encode_source(
        source,
        Path(folder),
        codec=load_codec(replace(codec_config)),
        tokenizer=tokenizer,
        options=EncodeOptions(**{"shard_samples": 7, **options}),
    )


def encoded(folder, **fields):
    return SourceConfig("latents", path=str(folder), **fields)


def loader(sources, codec_config, tokenizer, **fields):
    return PackedLoader(
        DataConfig(sources=sources, **{"seq_len": 128, "pack_window": 20, **fields}),
        codec=load_codec(replace(codec_config)),
        tokenizer=tokenizer,
        tokens=SpecialTokens.of(tokenizer, len(tokenizer)),
        tokens_per_image=4,
        diffusion=DiffusionConfig(),
        sequences_per_step=2,
        seed=3,
        frozen_text=True,
        device="cpu",
    )


def read(packed_loader, num_steps):
    return list(packed_loader.steps(LoaderState(), num_steps))


def assert_same_steps(direct, cached):
    """Every number of every row, and what was left out and why, whatever the sources are called."""
    for one, other in zip(direct, cached, strict=True):
        assert replace(one, batches=[], damaged=()) == replace(other, batches=[], damaged=())
        assert [damage.reason for damage in one.damaged] == [damage.reason for damage in other.damaged]
        for row, twin in zip(one.batches, other.batches, strict=True):
            assert row.sample_ids == twin.sample_ids
            assert row.layout.num_tokens == twin.layout.num_tokens
            for name in TENSORS:
                assert torch.equal(getattr(row, name), getattr(twin, name)), name
