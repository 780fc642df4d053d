"""The Python examples of the LLaVAFusion guide in docs/guides.md run, in order; its numbers and links are right."""

import re
from pathlib import Path

import pytest
import torch

from tests.lmfusion.vlms import picture, save_vlm

PAGE = Path(__file__).parents[3] / "docs" / "guides.md"
SIZES = [((256, 256), 1176), ((1080, 1920), 1948), ((480, 640), 2340), ((1024, 1024), 2928)]
"""Height and width of an image, and its tokens."""
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_examples_run(tmp_path, monkeypatch):
    save_vlm(tmp_path / "models" / "vlm")
    (tmp_path / "photos").mkdir()
    picture(20, 13).save(tmp_path / "photos" / "house.png")
    monkeypatch.chdir(tmp_path)
    text, namespace = PAGE.read_text(encoding="utf-8"), {"__name__": "guides"}
    start = text.index("\n# Teach a vision-language model")  # the example of edits needs a model trained on edits
    blocks = list(BLOCK.finditer(text, start))
    assert len(blocks) == 3
    with torch.random.fork_rng(devices=[]):
        for match in blocks:
            line = text.count("\n", 0, match.start(1))
            exec(compile("\n" * line + match[1], str(PAGE), "exec"), namespace)
    assert len(namespace["captions"]) == 1 and namespace["image"].size == (8, 8)
    assert namespace["logits"].shape[-1] == namespace["model"].boi_token_id


@pytest.mark.parametrize(("size", "num_tokens"), SIZES)
def test_the_table_of_vision_tokens(size, num_tokens):
    from transformers import LlavaNextConfig

    from lmfusion.model.vision import num_vision_tokens

    assert num_vision_tokens(LlavaNextConfig(), *size) == num_tokens
    assert f" {num_tokens} |" in PAGE.read_text(encoding="utf-8")


def test_links_lead_somewhere():
    text = PAGE.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert (PAGE.parent / file).exists() if file else anchor in headings, target
