"""An autoencoder learns, resumes to the same numbers, and becomes a codec that a model is trained with."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
import yaml
from PIL import Image

from lmfusion import LMFusion, cli
from lmfusion.model.codec import CodecConfig, load_codec
from lmfusion.model.configuration import ImageTowerConfig
from lmfusion.training import checkpoint
from lmfusion.utils.config_values import from_values
from lmfusion.utils.files import locked
from lmfusion.vae import losses
from lmfusion.vae.config import VAEConfig
from lmfusion.vae.trainer import VAETrainer
from tests.lmfusion.vae.runs import assert_same_run, read_metrics, values_of_a_run


@pytest.fixture
def train(tmp_path):
    """Trains in a folder named `output` and returns the trainer."""

    def run(output, max_steps=None, **overrides):
        trainer = VAETrainer(from_values(VAEConfig, values_of_a_run(tmp_path / output, **overrides)))
        trainer.run(max_steps)
        return trainer

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run long enough to learn something."""
    train = {"num_steps": 150, "batch_size": 16, "learning_rate": 6e-3, "warmup_steps": 2, "ema_decay": 0.95}
    overrides = {"train": train, "data__sources": [{"kind": "digits"}]}
    overrides["validation"] = {"sources": [{"kind": "digits", "split": "test"}], "every": 50, "num_samples": 359}
    values = values_of_a_run(tmp_path_factory.mktemp("vae") / "run", **overrides)
    trainer = VAETrainer(from_values(VAEConfig, values))
    assert trainer.run()
    return trainer


def test_a_run_that_another_has_continued_since_it_was_read(train, tmp_path):
    train("unbroken")
    train("run", max_steps=4)
    values = values_of_a_run(tmp_path / "run")
    late = VAETrainer(from_values(VAEConfig, values_of_a_run(tmp_path / "run", train__learning_rate=1e-2)))
    assert late.step == 4
    assert VAETrainer(from_values(VAEConfig, values)).run()
    assert late.run() and late.step == 12
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    with locked(tmp_path / "run"), pytest.raises(OSError, match="in use by another process"):
        VAETrainer(from_values(VAEConfig, values))


def adversarial(vgg16):
    """All terms, on images large enough for them, with the discriminator from the fourth of six steps on."""
    return {
        "autoencoder__image_size": 16,
        "loss__lpips_weight": 0.1,
        "loss__vgg16": str(vgg16[0]),
        "loss__gan_weight": 0.5,
        "loss__gan_start": 3,
        "loss__discriminator_channels": 4,
        "loss__discriminator_layers": 1,
        "train__num_steps": 6,
        "train__batch_size": 2,
        "train__dtype": "bfloat16",
        "checkpoint__every": 5,
    }


def folder_with_a_broken_image(folder, num_good):
    """The only source of a run."""
    folder.mkdir()
    for i in range(num_good):
        Image.new("L", (8, 8), 25 * i).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return [{"kind": "folder", "path": str(folder)}]


def held_out(trainer):
    (batch,) = trainer.held_out.batches(0, 359, 359)
    return batch.images


def test_reconstructions_are_much_better_than_the_mean_image(trained):
    ratios = [line["psnr"] for line in read_metrics(trained.folder) if line["psnr"] is not None]
    images = held_out(trained)
    mean_image = losses.psnr(images.mean(0, keepdim=True).expand_as(images), images).mean().item()
    assert len(ratios) == 3 and ratios[0] < ratios[1] < ratios[2]
    assert ratios[-1] > mean_image + 6
    with Image.open(trained.folder / "reconstructions" / "step-00000150.png") as picture:
        assert picture.width > picture.height > 128


def test_result_is_a_codec_with_latents_of_unit_variance(trained, tiny_llama):
    config = CodecConfig("autoencoder_kl", path=str(trained.folder / "autoencoder"), channels=1, image_size=8)
    codec = load_codec(config)
    images = held_out(trained)
    latents = codec.encode(images)
    assert latents.shape == (359, 4, 4, 4)
    assert latents.mean().abs() < 0.1 and latents.std() == pytest.approx(1, abs=0.1)
    ratio = losses.psnr(codec.decode(latents), images).mean().item()
    # What validation measured, with the averaged weights
    assert ratio == pytest.approx(read_metrics(trained.folder)[-1]["psnr"], abs=1e-3)

    image = ImageTowerConfig(hidden_size=16, patch_coder={"kind": "linear", "patch_size": 2})
    model = LMFusion.from_llm(tiny_llama, image, config)
    assert model.tokens_per_image == 4
    (drawn,) = model.draw(["a handwritten two"], num_steps=2)
    assert drawn.size == (8, 8)


def test_scale_is_that_of_all_training_images(trained):
    settings = json.loads((trained.folder / "autoencoder" / "config.json").read_text())
    images = torch.cat([batch.images for batch in trained.loader.batches(0, 1024, 64)])
    with trained.ema.applied(), torch.no_grad():
        latents = trained.autoencoder.encode(images).mean
    assert settings["shift_factor"] == pytest.approx(latents.mean().item(), rel=1e-3)
    assert settings["scaling_factor"] == pytest.approx(1 / latents.std().item(), rel=1e-3)
    assert settings["latent_channels"] == 4


@pytest.mark.parametrize("stopped_at", [1, 4, 7])
def test_resumed_run_equals_an_unbroken_one(train, stopped_at):
    whole = train("whole")
    train("broken", max_steps=stopped_at)
    again = train("broken", data__num_workers=3, data__cache_megabytes=0)
    assert_same_run(whole.folder, again.folder)


def test_resume_between_lines_of_metrics(train):
    whole = train("whole", train__log_every=5)
    for max_steps in (3, 7, 12):
        broken = train("broken", max_steps=max_steps, train__log_every=5)
    assert [line["step"] for line in read_metrics(broken.folder)] == [5, 10]
    assert_same_run(whole.folder, broken.folder)


def test_resume_with_all_terms_in_bfloat16(train, vgg16):
    whole = train("whole", **adversarial(vgg16))
    for max_steps in (4, 6):
        broken = train("broken", max_steps=max_steps, **adversarial(vgg16))
    assert_same_run(whole.folder, broken.folder, step=6)
    lines = read_metrics(whole.folder)
    names = ("gan", "gan_weight", "discriminator_loss", "discriminator_grad_norm")
    assert all(line[name] is None for line in lines[:3] for name in names)
    assert all(line[name] is not None for line in lines[3:] for name in names)
    assert all(line["lpips"] > 0 for line in lines)
    for line in lines[3:]:  # 32 latent values and 256 pixels
        gan = 0.5 * line["gan_weight"] * line["gan"]
        assert line["loss"] == pytest.approx(line["l1"] + 0.1 * line["lpips"] + gan + 1e-6 * line["kl"], rel=1e-5)


def test_kl_is_weighed_by_image_value(train):
    (line, *_) = read_metrics(train("run", max_steps=1, loss__kl_weight=3.0).folder)
    assert line["loss"] == pytest.approx(line["l1"] + 3 * line["kl"] * (4 * 4 * 4) / (1 * 8 * 8), rel=1e-5)


def test_kl_pulls_the_posterior_towards_a_normal(train):
    last = {weight: read_metrics(train(f"run{weight}", loss__kl_weight=weight).folder)[-1] for weight in (0, 1.0)}
    assert last[1.0]["kl"] < 0.5 * last[0]["kl"]


def test_recompute_gives_the_same_numbers(train):
    plain, recomputed = train("plain", max_steps=3), train("recomputed", max_steps=3, train__recompute=True)
    assert recomputed.autoencoder.kl.is_gradient_checkpointing
    assert read_metrics(plain.folder) == read_metrics(recomputed.folder)


def test_without_held_out_images_nothing_is_measured(train):
    run = train("run", max_steps=6, validation__sources=[])
    assert all(line["psnr"] is None for line in read_metrics(run.folder))
    assert not (run.folder / "reconstructions").exists()


def test_held_out_images_that_cannot_be_read_are_an_error_at_the_start(train, tmp_path):
    sources = folder_with_a_broken_image(tmp_path / "images", num_good=0)
    with pytest.raises(ValueError, match=r"validation\.sources: no image can be read"):
        train("run", validation__sources=sources)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_before_the_update(train, tmp_path, monkeypatch):
    whole = train("whole")
    real, calls = losses.l1, []

    def l1(*args):
        calls.append(real(*args))
        return calls[-1] * float("nan") if len(calls) == 7 else calls[-1]

    monkeypatch.setattr(losses, "l1", l1)
    with pytest.raises(ValueError, match=r"step 6: not finite: loss, l1, grad_norm; no update .*: digits/\d+, "):
        train("broken")
    assert checkpoint.list_steps(tmp_path / "broken" / "checkpoints") == [4, 6]
    assert_same_run(whole.folder, train("broken").folder)


def test_damaged_images_are_skipped_and_counted_once(train, tmp_path):
    folder = {"data__sources": folder_with_a_broken_image(tmp_path / "images", num_good=9), "train__num_steps": 10}
    whole = train("whole", **folder)
    for max_steps in (3, 10):
        broken = train("broken", max_steps=max_steps, **folder)
    assert_same_run(whole.folder, broken.folder, step=10)
    assert read_metrics(whole.folder)[-1]["num_damaged"] == 8  # 80 images in eight epochs
    named = [json.loads(line) for line in (broken.folder / "damaged.jsonl").read_text().splitlines()]
    assert len(named) == 8 and {line["sample_id"] for line in named} == {"broken.png"}


def test_too_many_damaged_images_end_the_run_with_a_checkpoint(train, tmp_path):
    folder = {"data__sources": folder_with_a_broken_image(tmp_path / "images", num_good=1)}
    with pytest.raises(ValueError, match=r"at most data\.max_damaged, 0\.01, got 11 of \d+ samples"):
        train("run", **folder, train__batch_size=2)
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [8, 11]
    assert train("run", **folder, train__batch_size=2, data__max_damaged=0.6).step == 12
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 13))


def test_a_batch_without_a_readable_image_is_an_error(train, tmp_path):
    sources = folder_with_a_broken_image(tmp_path / "images", num_good=0)
    with pytest.raises(ValueError, match="step 0: no image of the batch can be read"):
        train("run", data__sources=sources, data__max_damaged=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train__batch_size": 4}, "train.batch_size was 8, is 4"),
        ({"autoencoder__latent_channels": 8}, "autoencoder was"),
        ({"loss__kl_weight": 1.0}, "loss was"),
        ({"data__sources": [{"kind": "digits"}]}, "data.sources was .* number of samples was 359, is 1438"),
    ],
)
def test_another_run_is_refused(train, change, named):
    train("run", max_steps=2)
    with pytest.raises(ValueError, match=f"belongs to another run: .*{named}"):
        train("run", **change)


def test_several_processes_are_refused(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="must be trained by one process; start it without torchrun"):
        train("run")


def test_command_line_stops_at_a_signal_and_continues(tmp_path, train, monkeypatch, capsys):
    whole = train("whole")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values_of_a_run(tmp_path / "run")))
    real = VAETrainer._update

    def update_and_signal(trainer, batch):
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer, batch)

    monkeypatch.setattr(VAETrainer, "_update", update_and_signal)
    assert cli.main(["train-vae", str(recipe)]) == 75
    assert "interrupted after step 6" in capsys.readouterr().out
    assert not (tmp_path / "run" / "autoencoder").exists()
    monkeypatch.setattr(VAETrainer, "_update", real)
    assert cli.main(["train-vae", str(recipe), "data.num_workers=2"]) == 0
    assert "resuming after step 6" in (out := capsys.readouterr().out) and "the autoencoder is in" in out
    assert_same_run(whole.folder, tmp_path / "run")


@pytest.mark.slow
def test_killed_run_equals_an_unbroken_one(tmp_path, train, monkeypatch):
    whole = train("whole", checkpoint__every=2)
    recipe, metrics = tmp_path / "recipe.yaml", tmp_path / "run" / "metrics.jsonl"
    recipe.write_text(yaml.safe_dump(values_of_a_run(tmp_path / "run", checkpoint__every=2)))
    # Forked from a new process: this one has threads, and a fork may copy a lock that one of them holds
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["lmfusion.vae.trainer", "diffusers"])
    for num_lines in (3, 6, 9, None):
        process = server.Process(target=cli.main, args=(["train-vae", str(recipe)],))
        process.start()
        deadline = time.monotonic() + 60
        while num_lines and (metrics.read_bytes().count(b"\n") if metrics.exists() else 0) < num_lines:
            assert process.is_alive() and time.monotonic() < deadline, "the run makes no steps"
            time.sleep(0.001)
        if num_lines:
            process.kill()
        process.join(100)
        assert process.exitcode == (-signal.SIGKILL if num_lines else 0)
    assert_same_run(whole.folder, tmp_path / "run")
