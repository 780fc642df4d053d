"""tools/check_words.py finds retired names, unidiomatic phrases and module docstrings that ask, and nothing else."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "check_words.py"

pytestmark = pytest.mark.skipif(not TOOL.is_file(), reason="not a checkout")


def check(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, path], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('"""How does a run survive?"""\n', 1, "asks a question"),
        ('"""Checkpoints. Which ones?\n\nMore."""\n', 1, "asks a question"),
        ('"""Checkpoints."""\nrow_tokens = 3\n', 2, "'row_tokens': write seq_len"),
        ('"""Checkpoints."""\n# This is no file.\n', 2, "is not a, or has no"),
        ('"""Checkpoints."""\n# All but for one, and whoever asks.\n', 2, "except for"),
        ('"""Checkpoints."""\nraise ValueError(f"size is {size}; it must be 3")\n', 2, "X must ..., got Y"),
    ],
)
def test_finds(tmp_path, text, line, message):
    path = tmp_path / "a.py"
    path.write_text(text)
    found = check(path)
    assert found.returncode == 1
    assert found.stdout.startswith(f"{path}:{line}: ") and message in found.stdout


def test_a_question_at_the_top_of_a_c_file(tmp_path):
    path = tmp_path / "a.cpp"
    path.write_text("// What is this?\n")
    assert "a.cpp:1: the first line asks a question" in check(path).stdout


@pytest.mark.parametrize(
    "text",
    [
        '"""Checkpoints: atomic, hashed."""\n\n# Is it there? There is no file here, and it is no longer needed.\n',
        '"""Sizes."""\n\nnum_row_tokens = "seq_len"\n',
        '"""Sizes."""\n\nraise ValueError(f"size must be 3, got {size}")\n',
    ],
)
def test_lets_pass(tmp_path, text):
    path = tmp_path / "a.py"
    path.write_text(text)
    found = check(path)
    assert (found.returncode, found.stdout) == (0, "")


def test_every_retired_name_has_another():
    names = tomllib.loads((ROOT / "tools" / "retired_words.toml").read_text())["names"]
    assert len(names) > 20
    assert not [name for name, better in names.items() if not better or better in names]
