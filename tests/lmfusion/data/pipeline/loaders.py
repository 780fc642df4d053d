"""What the tests of packed sequences share: sources made of lists, loaders of them, and what their steps hold."""

import hashlib
from functools import partial
from itertools import chain

import numpy as np
import torch
from PIL import Image

from lmfusion.data import CaptionedImage, DataConfig, Latents, SourceConfig
from lmfusion.data.pipeline.loader import LoaderState, PackedLoader
from lmfusion.model.batch import SpecialTokens
from lmfusion.model.codec import CodecConfig, load_codec
from lmfusion.model.diffusion import DiffusionConfig

IMAGE_SIZE = 8
TOKENS_PER_IMAGE = 16


class Listed:
    """A source of samples given as a list; a text in the place of a sample is why it cannot be read."""

    def __init__(self, samples, blocks=None):
        self.samples = samples
        self.blocks = [len(samples)] if blocks is None else blocks

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        if isinstance(sample, str):
            raise ValueError(sample)
        return sample


def image(value=0):
    return Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), value)


def broken(reason="no image"):
    """An image that cannot be loaded."""
    raise OSError(reason)


def latents(value=0.0, std=None):
    """Latents of the right shape, as a latent cache gives them."""
    mean = torch.full((1, IMAGE_SIZE, IMAGE_SIZE), value)
    return Latents(mean, None if std is None else torch.full_like(mean, std))


def captioned(number, load_image=None, caption=None):
    caption = f"number {number}" + "!" * (number % 23) if caption is None else caption
    return CaptionedImage(f"s/{number}", load_image or partial(image, number % 256), (caption,))


def packed_loader(tokenizer, sources=None, monkeypatch=None, **kwargs):
    """A loader of the digits, or of `sources`: sequences of 256 tokens, four a step, windows of 100 samples."""
    configs = [SourceConfig("digits")]
    if sources is not None:
        weights = kwargs.pop("weights", [1.0] * len(sources))
        configs = [SourceConfig("folder", path=str(i), weight=weight) for i, weight in enumerate(weights)]
        monkeypatch.setattr("lmfusion.data.pipeline.loader.load_source", lambda config, size: sources[int(config.path)])
    fields = {"seq_len": 256, "pack_window": 100}
    fields |= {name: kwargs.pop(name) for name in list(kwargs) if name in DataConfig.__dataclass_fields__}
    defaults = {
        "codec": load_codec(CodecConfig(image_size=IMAGE_SIZE, channels=1)),
        "tokens": kwargs.pop("tokens", None) or SpecialTokens.of(tokenizer, len(tokenizer)),
        "tokens_per_image": TOKENS_PER_IMAGE,
        "diffusion": DiffusionConfig(),
        "sequences_per_step": 4,
        "seed": 3,
        "frozen_text": True,
        "device": "cpu",
    }
    return PackedLoader(DataConfig(configs, **fields), tokenizer=tokenizer, **{**defaults, **kwargs})


def read(loader, num_steps, state=LoaderState()):  # noqa: B008 (it is frozen)
    return list(loader.steps(state, num_steps))


def batch_digest(batch):
    """Of every number and name in a batch."""
    sha = hashlib.sha256()
    for name in ("token_ids", "labels", "latents", "noise", "timesteps"):
        tensor = getattr(batch, name)
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    sha.update(batch.layout.key_end.numpy().tobytes())
    sha.update(repr(batch.sample_ids).encode())
    return sha.hexdigest()


def contents(steps):
    """All that steps say, comparable."""
    return [
        (
            [batch_digest(batch) for batch in step.batches],
            step.state,
            step.epoch,
            step.num_samples,
            step.num_tokens_used,
            step.num_cut,
            step.damaged,
        )
        for step in steps
    ]


def sample_ids(steps):
    return list(chain.from_iterable(batch.sample_ids for step in steps for batch in step.batches))


def realistic_captions(num, seed=0):
    """Captions of 5 to 60 bytes, most of them short: tokens, for the tokenizer of these tests."""
    lengths = np.random.default_rng(seed).gamma(4.0, 5.0, num).clip(5, 60).astype(int)
    return ["x" * length for length in lengths]
