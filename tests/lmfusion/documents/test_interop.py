"""Does every Python example of docs/interop.md run as it stands there, in its order?"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lmfusion.model.modeling import LMFusion

pytest.importorskip("peft")

PAGE = Path(__file__).parents[3] / "docs" / "interop.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def namespace(tiny_llama, tmp_path_factory):
    """What is left behind by all examples, run in a folder that has a model and two photos."""
    folder = tmp_path_factory.mktemp("interop")
    shutil.copytree(tiny_llama, folder / "models" / "llm")
    model = LMFusion.from_llm(
        folder / "models" / "llm",
        image={"hidden_size": 16, "patch_coder": {"kind": "linear"}},
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
        diffusion={"prediction_type": "v_prediction"},
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "models" / "mine")
    (folder / "photos").mkdir()
    for i, name in enumerate(("house", "tree")):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 10), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{name}.png")

    text = PAGE.read_text(encoding="utf-8")
    namespace = {"__name__": "interop", "folder": folder}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        torch.manual_seed(0)
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1))
            exec(compile("\n" * line + match[1], str(PAGE), "exec"), namespace)
    return namespace


def test_the_examples_run(namespace):
    assert len(BLOCK.findall(PAGE.read_text(encoding="utf-8"))) >= 10
    assert len(namespace["answers"]) == 2 and namespace["logits"].shape[-1] == namespace["model"].boi_token_id


def test_the_adapter_that_was_trained_is_what_draws(namespace):
    drawn, without = (np.asarray(namespace[name][0]) for name in ("with_adapter", "without"))
    assert (drawn != without).any()
    merged = LMFusion.from_pretrained(namespace["folder"] / "models" / "merged")
    np.testing.assert_array_equal(np.asarray(merged.draw(["a red house"], num_steps=4)[0]), drawn)
    base = LMFusion.from_pretrained(namespace["folder"] / "models" / "mine")
    np.testing.assert_array_equal(np.asarray(base.draw(["a red house"], num_steps=4)[0]), without)


def test_schedulers_and_callbacks_had_a_say(namespace):
    model = namespace["model"]
    assert len(namespace["images"]) == 2
    plain = np.asarray(model.draw(["a tree"], num_steps=3)[0])
    assert (np.asarray(namespace["image"]) != plain).any()


def test_names_of_the_page_are_those_of_the_model(namespace):
    """Every option and module that the page names exists."""
    from lmfusion.generation import GenerationOptions

    text = PAGE.read_text(encoding="utf-8")
    model = namespace["model"]
    names = {name.replace(".0.", ".N.") for name, _ in model.named_modules()}
    assert set(re.findall(r"`(image\.layers\.N[\w.]+)`", text)) <= names
    options = {"max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "stop_strings", "negative_prompt"}
    options |= {"guidance_scale", "guidance_rescale", "num_steps", "seed", "image_size", "callback_on_step_end"}
    assert options <= set(re.findall(r"\w+", text)) and options <= set(GenerationOptions.__dataclass_fields__)
