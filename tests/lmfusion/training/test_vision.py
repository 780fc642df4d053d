"""Training with a vision-language base, whose text and input images keep their results, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lmfusion import LMFusion
from lmfusion.model.assembly import base_tensors
from lmfusion.model.records import tensor_digests
from lmfusion.model.verification import verify
from lmfusion.planning.estimate import Assumptions, estimate
from lmfusion.training.config import RunConfig, load_config
from lmfusion.training.trainer import Trainer
from lmfusion.utils.config_values import from_values, to_values
from tests.lmfusion.training.runs import assert_same_run, final_tensors, read_metrics
from tests.lmfusion.vlms import CODEC, IMAGE, build, picture, save_vlm

SHAPES = [(8, 8), (5, 23), (31, 7), (16, 16)]


@pytest.fixture
def vlm(tmp_path):
    """transformers' model and processor, saved in `tmp_path / "vlm"`."""
    return save_vlm(tmp_path / "vlm")


@pytest.fixture
def config(vlm, tmp_path):
    """A run of six steps on captions, conversations with input images, and edits."""
    lines = []
    for i, shape in enumerate(SHAPES):
        for name, size in (("shown", shape), ("drawn", (4, 4))):
            picture(*size, seed=i).save(tmp_path / f"{name}{i}.png")
        shown, drawn = {"image": f"shown{i}.png"}, {"image": f"drawn{i}.png"}
        say = {"role": "assistant", "content": ["Here:", drawn, "Done."]}
        lines.append({"messages": [{"role": "user", "content": [shown, f"number {i}"]}, say]})
        lines.append({"content": [f"picture {i}", drawn]})
        lines.append({"source": f"shown{i}.png", "instruction": "change it", "target": f"drawn{i}.png"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(output="run", **train) -> RunConfig:
        return from_values(
            RunConfig,
            {
                "output": str(tmp_path / output),
                "model": {"base": str(tmp_path / "vlm"), "image": IMAGE, "codec": CODEC},
                "data": {
                    "sources": [
                        {"kind": "interleaved", "path": str(tmp_path / "data.jsonl")},
                        {"kind": "digits", "weight": 0.5},
                    ],
                    "seq_len": 160,
                    "pack_window": 16,
                },
                "train": {
                    "num_steps": 6,
                    "batch_tokens": 320,
                    "warmup_steps": 1,
                    "learning_rate": 1e-2,
                    "log_every": 1,
                    **train,
                },
                "checkpoint": {"every": 3},
            },
        )

    return make


def understanding(model, processor):
    """Logits of texts, and of images with texts."""
    texts = [processor(text=text, return_tensors="pt")["input_ids"] for text in ("what is this?", "a")]
    logits = [model(ids).logits for ids in texts]
    for i, shape in enumerate(SHAPES):
        inputs = processor(images=picture(*shape, seed=i), text="see <image> well", return_tensors="pt")
        inputs.pop("attention_mask")
        logits.append(model(**inputs).logits)
    return logits


@torch.no_grad()
def test_training_does_not_change_a_bit_of_image_understanding_and_text(vlm, config, tmp_path):
    _, processor = vlm
    before = build(tmp_path / "vlm")
    logits, hashes = understanding(before, processor), tensor_digests(base_tensors(before))
    images = [picture(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    captions = before.caption(images, max_new_tokens=8)
    trainer = Trainer(config())
    start = {name: p.detach().clone() for name, p in trainer.model.image.named_parameters()}
    with torch.enable_grad():
        assert trainer.run()
    saved = LMFusion.from_pretrained(Path(config().output) / "model")
    changed = [name for name, p in trainer.model.image.named_parameters() if not torch.equal(p, start[name])]
    assert len(changed) > len(start) / 2  # it has learned
    for trained in (trainer.model.eval(), saved):
        assert all(map(torch.equal, understanding(trained, processor), logits))
        assert tensor_digests(base_tensors(trained)) == hashes == trained.base.sha256
        assert trained.caption(images, max_new_tokens=8) == captions
    assert sum(name.startswith("vision.") for name in hashes) == 60
    assert verify(saved).text_identical
    metrics = [json.loads(line) for line in (Path(config().output) / "metrics.jsonl").read_text().splitlines()]
    assert [line["num_damaged"] for line in metrics] == [0] * 6
    assert all(line["diffusion_loss"] > 0 for line in metrics)


def test_nothing_of_the_base_is_in_a_checkpoint(config):
    assert Trainer(config()).run()
    for tensors in final_tensors(config(), 6).values():
        assert not [name for name in tensors if "vision." in name or "text." in name]


def test_a_stopped_run_continues_to_the_same_numbers(config):
    unbroken, broken = config("unbroken"), config("broken")
    assert Trainer(unbroken).run()
    stopped = config("broken", num_steps=6)
    trainer = Trainer(stopped)
    steps = trainer.loader.steps

    def three(state, num_steps):
        yield from steps(state, 3)
        raise KeyboardInterrupt

    trainer.loader.steps = three
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert Trainer(broken).run()
    assert_same_run(unbroken, broken, 6)


def test_bfloat16_activations_with_float32_trained_weights(config):
    trainer = Trainer(config(dtype="bfloat16"))
    assert {p.dtype for p in trainer.model.vision.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.image.parameters()} == {torch.float32}
    assert trainer.run()


def test_two_ranks_give_the_numbers_of_one(config, tmp_path):
    """Both ranks hold the whole vision encoder, and each encodes the images of its own sequences."""
    alone, both = config("alone", num_steps=3), config("both", num_steps=3)
    assert Trainer(alone).run()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_values(both)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lmfusion"]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    finished = subprocess.run(
        [*command, "train", str(tmp_path / "recipe.yaml")], cwd=root, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    for line, found in zip(read_metrics(alone), read_metrics(both), strict=True):
        assert {key: found[key] for key in line} == pytest.approx(line, rel=1e-5)
    saved = LMFusion.from_pretrained(Path(both.output) / "model")
    assert tensor_digests(base_tensors(saved)) == saved.base.sha256


def test_an_estimate_counts_the_vision_encoder(config):
    """With the folder's own configuration, and with LLaVA-NeXT's sizes if its files are missing."""
    run = config(num_steps=6)
    model = build(run.model.base)
    found = estimate(run, Assumptions(num_gpus=1))
    assert found.num_parameters["vision encoder"] == sum(p.numel() for p in model.vision.parameters())
    assert found.num_parameters["text tower"] == sum(p.numel() for p in model.text.parameters())
    recipe = load_config(Path(__file__).parents[3] / "recipes" / "llavafusion.yaml", ["data.image_first=0"])
    paper = estimate(recipe, Assumptions(llm="llama3-llava-next-8b", num_gpus=8))
    assert paper.num_parameters["trained"] == pytest.approx(7.25e9, rel=1e-3)
    assert paper.memory["vision encoder"] == 2 * paper.num_parameters["vision encoder"]
    assert 0.32e9 < paper.num_parameters["vision encoder"] < 0.33e9 and not paper.problems
