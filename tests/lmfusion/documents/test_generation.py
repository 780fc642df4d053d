"""Every block of docs/generation.md runs, in order, on a tiny model, and its tables are those of the code."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lmfusion.cli import main
from lmfusion.generation import Limits
from lmfusion.generation.options import OPTIONS, Option
from lmfusion.model.modeling import LMFusion

GUIDE = Path(__file__).parents[3] / "docs" / "generation.md"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def workplace(tiny_llama, tmp_path, monkeypatch):
    """A folder with what the guide assumes: runs/digits/model and photo.png."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    model = LMFusion.from_llm(
        base,
        image={"hidden_size": 16, "patch_coder": {"kind": "linear"}},
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
    )
    model.tokenizer.chat_template = TEMPLATE
    with torch.no_grad():
        torch.nn.init.normal_(model.image.patch_coder.out_proj.weight)
    model.save_pretrained(tmp_path / "runs" / "digits" / "model")
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(20, 10)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks():
    found = re.findall(r"```(\w+)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(found) > 10 and {language for language, _ in found} == {"python", "bash"}
    return found


def test_every_block_runs(workplace):
    names = {}
    for language, block in blocks():
        if language == "python":
            exec(compile(block, str(GUIDE), "exec"), names)
        else:
            for line in block.strip().splitlines():
                program, *arguments = shlex.split(line)
                assert program == "lmfusion" and main(arguments) == 0, line
    for name in ("seven.png", "preview-010.png", "caption-2.png", "copy.png", "digits/0007.png", "variants/0000.png"):
        assert (workplace / name).exists(), name


def shown(default: Any) -> str:
    match default:
        case None:
            return "unset"
        case bool():
            return "yes" if default else "no"
        case str():
            return f'`"{default}"`'
        case int() | float():
            return f"{default:g}"
        case (low, high):
            return f"{low:g} to {high:g}"
    return "none"


def table_row(option: Option) -> str:
    """The row of the guide's table of options."""
    request_name = "" if option.request_name is None else f"`{option.request_name}`"
    return f"| `{option.name}` | {shown(option.default)} | {option.allowed} | {request_name} | {option.help} |"


def test_the_table_of_options_is_the_one_of_the_code():
    """The rows, in their order. After a change of an option, the assertion shows the rows to put into the guide."""
    rows = [line for line in GUIDE.read_text().splitlines() if line.startswith("| `") and line.count("|") == 6]
    assert rows == [table_row(option) for option in OPTIONS.values()]


def test_the_table_of_limits_is_the_one_of_the_code():
    text = GUIDE.read_text()
    for name, default in vars(Limits()).items():
        assert f"| `{name}` | {default:,}" in text, name


def test_links_lead_somewhere():
    text = GUIDE.read_text()
    headings = {re.sub(r"[^\w -]", "", line[3:]).lower().replace(" ", "-") for line in re.findall("## .*", text)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert (GUIDE.parent / file).exists() if file else anchor in headings, target
