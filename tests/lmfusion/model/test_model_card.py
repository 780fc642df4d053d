"""The model card: correct, readable by huggingface_hub, and edits to it are kept."""

import re
import shlex
import shutil

import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from lmfusion.cli import main
from lmfusion.model.assembly import summarize
from lmfusion.model.model_card import BEGIN, END, model_card
from lmfusion.model.modeling import LMFusion
from lmfusion.model.records import TrainingRecord

IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}
RECORD = TrainingRecord(
    num_steps=1200,
    num_samples=34567,
    batch_tokens=4096,
    sources=["digits train, weight 1", "folder cats, weight 0.5"],
    learning_rate=1e-3,
    min_learning_rate=1e-4,
    text_learning_rate_ratio=0.0,
    optimizer="adamw",
    dtype="bfloat16",
    ema_decay=0.99,
    seed=7,
)


@pytest.fixture
def model(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "my-llm")
    return LMFusion.from_llm(
        tmp_path / "my-llm", image=IMAGE, codec=CODEC, diffusion={"prediction_type": "v_prediction"}
    )


def card_of(model):
    return model_card(model.config, summarize(model), model.base, model.trained, "image")


def test_the_hub_can_read_it(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.to_dict() == {
        "license": "unknown",
        "library_name": "lmfusion",
        "pipeline_tag": "any-to-any",
        "tags": ["lmfusion", "text-to-image", "image-to-text", "mixture-of-transformers", "diffusion"],
    }
    assert card.text.startswith(BEGIN) and card.text.rstrip().endswith(END)
    assert "{" not in card.text.replace("{}", "")  # every field is filled


def test_it_tells_what_the_model_is(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text()
    num_text, num_image = (sum(p.numel() for p in tower.parameters()) for tower in (model.text, model.image))
    for fact in (
        "# my-llm, with an image tower",
        "bit for bit",
        f"`{model.base.digest}`",
        f"| text tower | {num_text / 1000:.3g} K parameters, 2 layers of width 32 |",
        f"| image tower | {num_image / 1000:.3g} K parameters, width 16, separation deep, patch coder linear",
        "| codec | pixels |",
        "| diffusion | v_prediction, cosine schedule of 1000 steps |",
        "| images | 4 x 4 pixels, grey; 4 tokens each |",
        "lmfusion verify .",
        "No training is recorded",
    ):
        assert fact in text, fact
    assert str(tmp_path) not in text  # where somebody keeps files is their own matter


def test_what_it_says_to_run_runs(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "m")
    Image.fromarray(np.zeros((9, 7), np.uint8)).save("photo.png")
    (commands,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in commands.splitlines()]
    assert [command[:2] for command in commands] == [["lmfusion", name] for name in ("generate", "caption", "verify")]
    assert [main(command[1:]) for command in commands] == [0, 0, 0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace = {}
    exec(code, namespace)
    assert namespace["images"][0].size == (4, 4) and len(namespace["captions"]) == 1


def test_a_chat_model_is_shown_as_one(model):
    assert "--chat" not in card_of(model)
    model.config.chat_system_prompt = "You draw."
    assert 'say what you drew." --chat\n' in card_of(model)


def test_an_autoencoder_is_told_by_its_digest(model):
    model.config.codec.kind, model.config.codec.path, model.config.codec.sha256 = "autoencoder_kl", "vae", "abc"
    assert "| codec | autoencoder_kl, 0 parameters, sha256 `abc` |" in card_of(model)


def test_it_tells_of_all_parts_and_of_a_trained_text_tower(model, tmp_path):
    model.freeze_text(False)
    model.save_pretrained(tmp_path / "m", parts="all")
    text = (tmp_path / "m" / "README.md").read_text()
    assert "Its text side has been trained too." in text and "bit for bit." not in text
    assert "| in this folder | all parts |" in text and "base=FOLDER" not in text


def test_it_tells_of_the_training(model, tmp_path):
    model.trained = RECORD
    model.save_pretrained(tmp_path / "m")
    loaded = LMFusion.from_pretrained(tmp_path / "m")
    assert loaded.trained == RECORD
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("m", "again"):
        text = (tmp_path / folder / "README.md").read_text()
        for row in (
            "| data | digits train, weight 1; folder cats, weight 0.5 |",
            "| samples read | 34,567 |",
            "| updates | 1,200 of 4,096 tokens |",
            "| learning rate | 0.001, falling to 0.0001; adamw |",
            "| text tower | frozen |",
            "| averaged weights | yes, decay 0.99 |",
        ):
            assert row in text, row


def test_a_record_does_not_pass_to_the_next_model_in_the_folder(model, tmp_path):
    model.trained = RECORD
    model.save_pretrained(tmp_path / "m")
    model.trained = None
    model.save_pretrained(tmp_path / "m")
    assert LMFusion.from_pretrained(tmp_path / "m").trained is None
    assert "No training is recorded" in (tmp_path / "m" / "README.md").read_text()


def test_a_damaged_record_is_named(model, tmp_path):
    model.trained = RECORD
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "training.json").write_text('{"num_steps": "many"}')
    with pytest.raises(ValueError, match=r"training\.json\.num_samples is missing"):
        LMFusion.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\n---\n# An LLM\n", "apache-2.0"),
        ("# An LLM\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_license_is_the_base_llms_where_it_is_known(model, tmp_path, card, license):
    if card is not None:
        (tmp_path / "my-llm" / "README.md").write_text(card)
    model.save_pretrained(tmp_path / "m")
    assert ModelCard.load(tmp_path / "m" / "README.md").data.license == license


def test_a_base_on_the_hub_is_named(model):
    model.base.name = "HuggingFaceTB/SmolLM2-135M"
    card = ModelCard(card_of(model))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M"
    validate_repo_id(card.data.base_model)
    assert "# SmolLM2-135M, with an image tower" in card.text


def test_a_model_without_a_base(tiny_llama, tmp_path):
    model = LMFusion(LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC).config)
    model.save_pretrained(tmp_path / "m", parts="all")
    text = (tmp_path / "m" / "README.md").read_text()
    assert "No base LLM is recorded." in text and "lmfusion verify" not in text


# What people write into it


def test_what_is_outside_the_marks_is_kept(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "README.md"
    text = path.read_text()
    text = text.replace("license: unknown", "license: mit\nlanguage: de  # mine").replace(BEGIN, f"Hello.\n\n{BEGIN}")
    path.write_text(text.replace("4 x 4 pixels", "9 x 9 pixels") + "\n## Thanks\n\nTo all.\n")
    model.trained = RECORD
    model.save_pretrained(tmp_path / "m")
    new = path.read_text()
    assert ModelCard(new).data.license == "mit" and "language: de  # mine" in new
    assert "Hello." in new and new.endswith("\n## Thanks\n\nTo all.\n")
    assert "4 x 4 pixels" in new and "9 x 9" not in new and "| updates | 1,200" in new
    model.save_pretrained(tmp_path / "m")
    assert path.read_text() == new


@pytest.mark.parametrize("text", ["mine", "", f"mine {BEGIN}", f"{END} mine {BEGIN}", "\udcff bytes"])
def test_a_card_without_the_marks_is_somebody_elses(model, tmp_path, text):
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "README.md"
    path.write_text(text, errors="surrogateescape")
    model.save_pretrained(tmp_path / "m")
    assert path.read_text(errors="surrogateescape") == text


def test_bytes_that_are_no_text_are_kept_around_the_marks(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "README.md"
    path.write_bytes(path.read_bytes() + b"\xff caf\xe9\r\n")
    model.save_pretrained(tmp_path / "m")
    assert path.read_bytes().endswith(b"\xff caf\xe9\r\n")
