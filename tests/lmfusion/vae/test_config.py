"""Is a recipe of an autoencoder refused where it makes no sense, and is the one that ships usable?"""

from pathlib import Path

import pytest
import torch
import yaml

from lmfusion.utils.config_values import from_values, to_values
from lmfusion.vae.autoencoder import Autoencoder
from lmfusion.vae.config import VAEConfig, load_vae_config
from lmfusion.vae.trainer import VAETrainer
from tests.lmfusion.vae.runs import read_metrics, values_of_a_run

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "vae.yaml"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autoencoder__channels": 4}, "autoencoder.channels is 4; images have 1"),
        ({"autoencoder__block_out_channels": []}, "block_out_channels is empty"),
        ({"autoencoder__block_out_channels": [8, 18]}, "has a 18; they are multiples of norm_num_groups, 4"),
        ({"autoencoder__image_size": 7}, "image_size is 7; with 2 levels it is a multiple of 2"),
        ({"autoencoder__latent_channels": 0}, "autoencoder.latent_channels must be at least 1, got 0"),
        ({"autoencoder__width": 3}, "unknown key autoencoder.width"),
        ({"data__sources": []}, "data.sources is empty"),
        ({"data__max_damaged": 2}, "data.max_damaged is 2"),
        ({"data__num_workers": 0}, "data.num_workers must be at least 1, got 0"),
        ({"loss__lpips_weight": 1.0}, "loss.vgg16 is None; LPIPS needs"),
        ({"loss__vgg16": "vgg"}, "loss.lpips_weight is 0.0 and loss.vgg16 is 'vgg'; LPIPS needs"),
        ({"loss__lpips_weight": 1.0, "loss__vgg16": "vgg"}, "image_size is 8; LPIPS needs images of 16 pixels"),
        ({"loss__gan_weight": 0.5}, "image_size is 8; the discriminator needs images of 24 pixels"),
        ({"loss__discriminator_channels": 48}, "discriminator_channels is 48; above 32"),
        ({"loss__kl_weight": -1}, "loss.kl_weight must be at least 0, got -1.0"),
        ({"train__learning_rate": 0}, "train.learning_rate is 0.0; it must be a positive number"),
        ({"train__betas": [0.5, 1]}, "train.betas is"),
        ({"train__warmup_steps": 13}, "train.warmup_steps is 13, more than train.num_steps, 12"),
        ({"train__min_learning_rate": 1}, "train.min_learning_rate is 1.0, more than train.learning_rate, 0.003"),
        ({"train__dtype": "float16"}, "train.dtype is 'float16'; it must be one of float32, bfloat16"),
        ({"train__device": "tpu"}, "train.device is 'tpu'"),
        ({"validation__every": 0}, "validation.every must be at least ., got 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_values(VAEConfig, values_of_a_run("run", **change))


def test_recipes_are_read_with_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values_of_a_run("run")))
    config = load_vae_config(path, ["train.batch_size=3", "loss.kl_weight=1e-3"])
    assert (config.train.batch_size, config.loss.kl_weight) == (3, 1e-3)
    assert from_values(VAEConfig, to_values(config)) == config
    with pytest.raises(ValueError, match="no recipe at"):
        load_vae_config(tmp_path / "none.yaml")
    path.write_text("just words")
    with pytest.raises(ValueError, match="holds no keys"):
        load_vae_config(path)


def test_recipe_is_the_autoencoder_of_the_paper():
    config = load_vae_config(RECIPE).autoencoder
    with torch.device("meta"):
        model = Autoencoder(config, seed=0)
    assert config.latent_shape == (8, 32, 32)
    assert 80e6 < sum(weight.numel() for weight in model.parameters()) < 90e6


def test_emoji_part_of_the_recipe_is_a_recipe_too():
    _, _, comment = RECIPE.read_text().partition("# For emoji")
    lines = [line.removeprefix("#   ") for line in comment.splitlines() if line.startswith("#   ")]
    config = from_values(VAEConfig, yaml.safe_load("\n".join(lines)))
    with torch.device("meta"):
        model = Autoencoder(config.autoencoder, seed=0)
    assert config.autoencoder.latent_shape == (8, 16, 16)
    assert 20e6 < sum(weight.numel() for weight in model.parameters()) < 22e6


def test_recipe_trains_at_tiny_size(tmp_path, vgg16):
    config = load_vae_config(
        RECIPE,
        [
            f"output={tmp_path / 'run'}",
            "autoencoder.image_size=24",
            "autoencoder.block_out_channels=[4,4,4,8]",
            "autoencoder.norm_num_groups=2",
            "data.sources=[{kind: digits, split: test}]",
            "data.num_workers=1",
            f"loss.vgg16={vgg16[0]}",
            "loss.gan_start=1",
            "loss.discriminator_channels=4",
            "train.batch_size=4",
            "train.device=cpu",
            "train.log_every=1",
            "validation.sources=[{kind: digits}]",
            "validation.every=3",
            "validation.num_samples=4",
        ],
    )
    assert VAETrainer(config).run(max_steps=3)
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["gan"] is not None and lines[-1]["lpips"] > 0 and lines[-1]["psnr"] > 0
