"""The frame of the command line, and `lmfusion train`."""

import re
import subprocess
import sys

import pytest
import yaml

from lmfusion.cli import COMMANDS, main
from lmfusion.cli import train as train_command


@pytest.fixture
def recipe(tiny_llama, tmp_path):
    values = {
        "output": str(tmp_path / "run"),
        "model": {
            "base": str(tiny_llama),
            "image": {"hidden_size": 16, "patch_coder": {"kind": "linear", "patch_size": 4}},
            "codec": {"channels": 1, "image_size": 8},
        },
        "data": {"sources": [{"kind": "digits"}], "seq_len": 128},
        "train": {"num_steps": 3, "batch_tokens": 128, "warmup_steps": 1, "log_every": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_help_lists_every_command_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom lmfusion.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as exit:\n    assert exit.code == 0\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'PIL', 'yaml', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(re.search(rf"^    {command}\s", result.stdout, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: lmfusion {command}") and len(text.splitlines()) > 8


def test_unknown_command_and_missing_argument(capsys):
    for arguments in (["tarin"], ["train"], []):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
    assert "required: recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["a=1", "--max-steps", "3", "b=2"], ["--max-steps", "3", "a=1", "b=2"], ["a=1", "b=2", "--max-steps", "3"]],
)
def test_overrides_go_before_and_after_options(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr("lmfusion.cli.train.run", lambda args: seen.append((args.overrides, args.max_steps)) or 0)
    assert main(["train", "recipe.yaml", *arguments]) == 0
    assert seen == [(["a=1", "b=2"], 3)]


def test_unknown_options_are_refused_beside_overrides(capsys):
    with pytest.raises(SystemExit):
        main(["train", "recipe.yaml", "a=1", "--max-stepz", "3"])
    assert "unrecognized arguments: --max-stepz" in capsys.readouterr().err


def test_version(capsys):
    from lmfusion import __version__

    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("num is 3"), 2, "lmfusion: error: num is 3\n"),
        (OSError("disk full"), 2, "lmfusion: error: disk full\n"),
        (KeyboardInterrupt(), 130, "lmfusion: interrupted\n"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(monkeypatch, capsys, error, code, message):
    def run(args):
        raise error

    monkeypatch.setattr(train_command, "run", run)
    assert main(["train", "recipe.yaml"]) == code
    assert capsys.readouterr().err == message


def test_defects_are_not_hidden(monkeypatch):
    monkeypatch.setattr(train_command, "run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "recipe.yaml"])


def test_train_and_resume(recipe, tmp_path, capsys):
    assert main(["train", recipe, "--max-steps", "2"]) == 0
    assert "trained 2 steps" in capsys.readouterr().out
    assert main(["train", recipe]) == 0
    assert "resuming after step 2" in capsys.readouterr().out
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_interrupted_training_says_so(recipe, monkeypatch, capsys):
    from lmfusion.training.trainer import Trainer

    monkeypatch.setattr(Trainer, "run", lambda self, max_steps: False)
    assert main(["train", recipe]) == 75
    assert "the same command continues" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.num_stepz=1"], "unknown key train.num_stepz; did you mean train.num_steps?"),
        (["--max-steps", "0"], "--max-steps is 0"),
        (["model.base=/nowhere/llm"], "/nowhere/llm"),
        (["model.image.patch_coder.patch_size=3"], "does not divide into patches of 3 x 3"),
    ],
)
def test_bad_input_is_one_line(recipe, capsys, arguments, message):
    assert main(["train", recipe, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lmfusion: error: ") and message in error and error.count("\n") == 1
