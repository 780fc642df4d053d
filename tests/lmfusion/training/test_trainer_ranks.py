"""Two gloo ranks: the numbers of one, and stops that both make together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lmfusion.training.checkpoint import list_steps
from lmfusion.training.trainer import Trainer
from lmfusion.utils.config_values import to_values
from tests.lmfusion.training.runs import read_metrics


@pytest.fixture
def ranks(config, tmp_path):
    """The run of one process, the folder of the runs of two, and the results of the two ranks."""
    validation = {"sources": [{"kind": "digits", "split": "test"}], "every": 3, "num_samples": 23}
    sample = {"prompts": ["a one"], "every": 6, "num_steps": 2, "num_images": 2}
    alone = config("alone", train__num_steps=6, validation=validation, sample=sample, checkpoint__every=100)
    assert Trainer(alone).run()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_values(alone)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    script = ["-m", "tests.lmfusion.training.two_rank_runs", str(tmp_path)]
    finished = subprocess.run([*command, *script], cwd=root, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return alone, tmp_path, [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_two_ranks(ranks):
    alone, folder, said = ranks
    assert [each["finished"] for each in said] == [True, True]

    expected = read_metrics(alone)
    for line, found in zip(expected, lines(folder / "unbroken", "metrics.jsonl"), strict=True):
        assert {key: found[key] for key in line} == pytest.approx(line, rel=1e-5)
    for line, found in zip(
        lines(folder / "alone", "validation.jsonl"), lines(folder / "unbroken", "validation.jsonl"), strict=True
    ):
        losses, other = line.pop("diffusion_losses"), found.pop("diffusion_losses")
        assert found == pytest.approx(line, rel=1e-5) and other == pytest.approx(losses, rel=1e-5)
    picture = "samples/step-00000006.png"
    assert (folder / "unbroken" / picture).stat().st_size == (folder / "alone" / picture).stat().st_size

    first, second = (each["poisoned"] for each in said)
    assert first["step"] == second["step"] == 4
    assert "step 5: the loss is not finite" in first["error"] and "another rank names" in first["error"]
    assert second["poisoned"][0] in second["error"].split("samples: ")[1].split(", ")
    assert list_steps(folder / "poisoned" / "checkpoints") == [4]
    assert [line["step"] for line in lines(folder / "poisoned", "metrics.jsonl")] == [3]

    first, second = (each["unreadable"] for each in said)
    assert first == {"error": "no such tar", "step": 3}
    assert second["step"] == 3 and "another rank cannot read its data" in second["error"]

    for each in said:
        assert each["stopped"] == {"finished": False, "step": 3, "finished after": True}
    for line, found in zip(expected, lines(folder / "stopped", "metrics.jsonl"), strict=True):
        assert {key: found[key] for key in line} == pytest.approx(line, rel=1e-5)
