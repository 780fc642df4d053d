"""Validation: the same samples, noise and timesteps every time, whatever the workers, and no effect on training."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from lmfusion.training.build import validation_loader
from lmfusion.training.distributed import World
from lmfusion.training.trainer import Trainer
from lmfusion.training.validation import Validation
from tests.lmfusion.training.runs import assert_same_run

HELD_OUT = {"sources": [{"kind": "digits", "split": "test"}], "every": 3, "num_samples": 20}


def lines(run):
    return [json.loads(line) for line in (Path(run.output) / "validation.jsonl").read_text().splitlines()]


def build(run, world=None):
    trainer = Trainer(run)
    world = world or trainer.world
    make_loader = partial(validation_loader, config=run, model=trainer.model, world=world)
    return trainer, Validation(run, world, make_loader)


@pytest.fixture
def validated(config):
    run = config("validated", validation=HELD_OUT)
    assert Trainer(run).run()
    return run


def test_lines_and_learning(config):
    run = config(validation={**HELD_OUT, "every": 20}, train__num_steps=60, train__learning_rate=1e-2)
    assert Trainer(run).run()
    first, _, last = lines(run)
    assert (first["step"], last["step"]) == (20, 60)
    assert list(last["diffusion_losses"]) == ["62", "187", "312", "437", "562", "687", "812", "937"]
    assert last["diffusion_loss"] == pytest.approx(sum(last["diffusion_losses"].values()) / 8)
    assert last["diffusion_loss"] < first["diffusion_loss"] - 0.02
    assert last["num_samples"] == 20 and last["num_damaged"] == 0
    assert last["lm_loss"] < first["lm_loss"]
    assert last["caption_first_lm_loss"] == pytest.approx(first["caption_first_lm_loss"], rel=0.2)


def test_validation_changes_no_number_of_training(validated, unbroken):
    assert_same_run(validated, unbroken)


def test_resumed_run_writes_each_line_once(config, validated):
    run = config("broken", validation=HELD_OUT, data__num_workers=3)
    for max_steps in (4, 7, 12):
        Trainer(run).run(max_steps=max_steps)
        with open(Path(run.output) / "validation.jsonl", "a") as file:
            file.write('{"step": 99, "lm_loss": 1.0}\n{"step": 99, "lm_')
    assert Trainer(run).run()
    assert lines(run) == lines(validated)


def test_the_averaged_weights_are_scored(config):
    run = config(validation=HELD_OUT, train__num_steps=3, train__ema_decay=0.9)
    trainer, validation = build(run)
    assert trainer.run()
    with trainer.ema.applied():
        averaged = validation.evaluate(trainer.model.eval(), 3)
    weights = validation.evaluate(trainer.model.eval(), 3)
    assert json.loads(json.dumps(asdict(averaged))) == lines(run)[0]
    assert averaged.diffusion_loss != weights.diffusion_loss


def test_every_rank_computes_its_share(config):
    """Two ranks together get the result of one. Here they take turns, and the test adds up their sums."""
    run = config(validation={**HELD_OUT, "num_samples": 23})
    trainer, validation = build(run)
    whole = validation.evaluate(trainer.model.eval(), 0)
    places = []

    class Rank(World):
        def sum_tensor(self, x):
            places.append(x.clone())
            return x

        def sum_integers(self, values):
            return [self.size * value for value in values]

    for rank in range(2):
        build(run, Rank(rank, 2, torch.device("cpu")))[1].evaluate(trainer.model, 0)
    (first, first_clean), (second, second_clean) = places[:2], places[2:]
    assert not ((first != 0) & (second != 0)).any() and (first != 0).any() and (second != 0).any()
    num_images = validation._caption_first.num_images
    losses = ((first + second).sum(0)[:, 1] / num_images).tolist()
    assert losses == list(whole.diffusion_losses.values())
    assert (first_clean + second_clean).sum(0)[0, 0].item() / validation._image_first.num_labels == whole.lm_loss


def test_ranks_that_read_different_samples_raise(config):
    class Rank(World):
        def sum_integers(self, values):
            return [2 * value + (i == 3) for i, value in enumerate(values)]  # the other rank misses a sample

    with pytest.raises(ValueError, match=r"ranks must read the same samples of validation\.sources, got 20"):
        build(config(validation=HELD_OUT), Rank(0, 2, torch.device("cpu")))


def test_a_source_gives_no_more_than_it_has(config):
    validation = build(config(validation={**HELD_OUT, "num_samples": 1000}))[1]
    assert validation._caption_first.num_samples == 359


def test_captions_before_their_image_are_scored_whole(config):
    trainer, validation = build(config(validation=HELD_OUT))
    documents = [d for _, batch in validation._caption_first.mine for d in batch.sample_ids]
    assert len(set(documents)) == 20
    # Each document is bos, caption, BOI, image, EOI, eos
    num_tokens = sum(batch.layout.num_text for _, batch in validation._caption_first.mine)
    assert validation._caption_first.num_labels == num_tokens - 20, "all but BOI, which an image follows"
    assert trainer.model.frozen_text


def test_damaged_validation_data_is_named(config, tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
        (tmp_path / f"{i}.txt").write_text("none")
    sources = [{"kind": "folder", "path": str(tmp_path)}]
    run = config(validation={"sources": sources, "every": 2})
    with pytest.raises(
        ValueError, match=r"validation\.sources may be damaged, got 12 of 12 samples, such as .*\.png: "
    ):
        Trainer(run)
