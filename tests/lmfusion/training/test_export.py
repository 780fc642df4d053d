"""The model that a run exports, from a checkpoint alone, is the one that it trained."""

import json
from pathlib import Path

import pytest
import torch

from lmfusion import LMFusion
from lmfusion.training import export
from lmfusion.training.checkpoint import checkpoint_path, load_checkpoint
from lmfusion.training.config import load_config
from lmfusion.training.trainer import Trainer


def trained(run):
    trainer = Trainer(run)
    assert trainer.run()
    return trainer, checkpoint_path(Path(run.output) / "checkpoints", trainer.step)


def assert_same_files(one, other):
    """All files and values except the record of the training, which a model in memory does not have."""
    names, theirs = (
        {path.name for path in folder.iterdir()} - {"training.json", "README.md"} for folder in (one, other)
    )
    assert names == theirs and "model.safetensors" in names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_export_is_the_trained_model_with_the_averages(config, tmp_path, dtype, ratio):
    """The same files as those of the model in memory: the image part, or everything if the text tower was trained."""
    run = config(train__dtype=dtype, train__text_learning_rate_ratio=ratio, train__num_steps=3)
    trainer, path = trained(run)
    with trainer.ema.applied():
        trainer.model.eval().save_pretrained(tmp_path / "expected", parts="all" if ratio else "image")
    assert_same_files(tmp_path / "expected", Path(run.output) / "model")
    export.save_model(run, path, tmp_path / "again")
    assert_same_files(tmp_path / "expected", tmp_path / "again")

    model, averages = LMFusion.from_pretrained(tmp_path / "again"), load_checkpoint(path)[0]["ema"]
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], average) for name, average in averages.items())
    assert any(name.startswith("text.") for name in averages) == (ratio > 0)


def test_without_averages_none_are_kept_and_the_weights_are_exported(config, tmp_path):
    run = config(train__ema_decay=0.0, train__num_steps=4)
    assert Trainer(run).run(max_steps=2)
    trainer, path = trained(run)
    assert trainer.ema.state_tensors() == {} and not load_checkpoint(path)[0].get("ema")
    trainer.model.eval().save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "expected", Path(run.output) / "model")


def test_export_of_a_run_that_started_from_an_adapted_model(config, unbroken, tmp_path):
    adapted = {"adapted": str(Path(unbroken.output) / "model")}
    trainer, path = trained(config("further", model=adapted, train__num_steps=2))
    with trainer.ema.applied():
        trainer.model.eval().save_pretrained(tmp_path / "expected")
    export.save_model(trainer.config, path, tmp_path / "again")
    assert_same_files(tmp_path / "expected", tmp_path / "again")


def test_an_earlier_checkpoint_can_be_exported(config, unbroken, tmp_path):
    """From the config.yaml that a run writes."""
    path = checkpoint_path(Path(unbroken.output) / "checkpoints", 8)
    export.save_model(load_config(Path(unbroken.output) / "config.yaml"), path, tmp_path / "model")
    name = "image.layers.0.mlp.down_proj.weight"
    found = dict(LMFusion.from_pretrained(tmp_path / "model").named_parameters())[name]
    assert torch.equal(found, load_checkpoint(path)[0]["ema"][name])
    assert json.loads((path / "state.json").read_text())["step"] == 8


def test_an_export_records_how_it_was_trained(config, unbroken, tmp_path):
    folder = Path(unbroken.output) / "model"
    record = LMFusion.from_pretrained(folder).trained
    train, state = (
        unbroken.train,
        json.loads((Path(unbroken.output) / "checkpoints" / "step-00000012" / "state.json").read_text()),
    )
    assert (record.num_steps, record.num_samples) == (12, state["progress"]["num_samples"])
    assert (record.batch_tokens, record.learning_rate, record.seed) == (
        train.batch_tokens,
        train.learning_rate,
        train.seed,
    )
    assert len(record.sources) == len(unbroken.data.sources) and str(tmp_path.parent) not in "".join(record.sources)
    card = (folder / "README.md").read_text()
    assert "| updates | 12 of " in card and "| text tower | frozen |" in card and record.sources[0] in card
    LMFusion.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "training.json").read_text() == (folder / "training.json").read_text()


def test_damage_and_other_models_are_named(config, unbroken, tmp_path):
    path = checkpoint_path(Path(unbroken.output) / "checkpoints", 12)
    other = config(model__image={"hidden_size": 24, "patch_coder": {"kind": "linear", "patch_size": 4}})
    with pytest.raises(
        ValueError, match=r"must hold .* rows of ema/image\..*, got 1?\d rows: it belongs to another model"
    ):
        export.save_model(other, path, tmp_path / "model")
    (file,) = path.glob("ema.*")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"ema\.00000-of-00001\.safetensors is damaged"):
        export.save_model(unbroken, path, tmp_path / "model")
    assert not (tmp_path / "model").exists()
