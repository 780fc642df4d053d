"""Template variables: they override those of the model, are saved with images, and are refused without a template."""

import pytest
import torch

from lmfusion import LMFusion
from lmfusion.cli import main
from lmfusion.generation import ImageEnd, encode_prompt
from lmfusion.images.png import read_settings
from tests.lmfusion.generation.models import build
from tests.lmfusion.text.templates import DATED, THINKING

BLOCK = "<think>\n\n</think>\n\n"
ASKED = [{"role": "user", "content": "Hi."}]


@pytest.fixture
def model(tiny_llama, monkeypatch):
    model = build(tiny_llama)
    monkeypatch.setattr(model.tokenizer, "chat_template", THINKING)
    return model


def written(model, prompt, **options):
    return model.tokenizer.decode(encode_prompt(model, prompt, **options).parts[0])


def test_a_request_comes_over_the_model(model, monkeypatch):
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    assert not written(model, ASKED).endswith(BLOCK)
    assert written(model, ASKED, template_variables=off).endswith(BLOCK)
    assert written(model, "Hi.", chat=True, template_variables=off).endswith(BLOCK)
    monkeypatch.setattr(model.config, "template_variables", off)
    assert written(model, ASKED).endswith(BLOCK)
    assert not written(model, ASKED, template_variables=on).endswith(BLOCK)
    monkeypatch.setattr(model.tokenizer, "chat_template", DATED)
    assert written(model, ASKED, template_variables={"today": "2024-07-26"}).startswith("Today is 26 Jul 2024.")


def test_options_of_answers_and_streams(model):
    options = {"max_new_tokens": 2, "template_variables": {"enable_thinking": False}}
    plain = model.generate([ASKED], max_new_tokens=2)[0].num_prompt_tokens
    answer = model.generate([ASKED], **options)[0]
    assert answer.num_prompt_tokens == plain + len(BLOCK)
    drawn = {"max_images": 1, "draw_first": True, "num_steps": 1}
    [end] = [e for e in model.stream("Hi.", chat=True, **drawn, **options) if isinstance(e, ImageEnd)]
    assert end.settings["template_variables"] == {"enable_thinking": False}


def test_where_no_template_is_read_they_are_refused(model):
    variables = {"enable_thinking": False}
    for prompt in ("Hi.", ["Hi."]):
        with pytest.raises(ValueError, match="template_variables need a conversation; set chat=True"):
            model.generate([prompt], template_variables=variables)
    with pytest.raises(ValueError, match="draw takes captions, not conversations; leave out template_variables"):
        model.draw(["Hi."], template_variables=variables)
    with pytest.raises(ValueError, match="caption takes images, not conversations; leave out template_variables"):
        model.caption([torch.zeros(8, 8).numpy()], template_variables=variables)
    with pytest.raises(ValueError, match="must not have the key 'messages'"):
        model.generate([ASKED], template_variables={"messages": []})


def test_they_are_saved_with_the_model_and_given_on_the_command_line(model, tmp_path, monkeypatch, capsys):
    model.config.template_variables = {"enable_thinking": False}
    model.save_pretrained(tmp_path / "model")
    assert LMFusion.from_pretrained(tmp_path / "model").config.template_variables == {"enable_thinking": False}
    monkeypatch.chdir(tmp_path)
    command = ["generate", "model", "Hi.", "--chat", "--min-images", "1", "--max-images", "1", "--num-steps", "1"]
    command += ["--max-new-tokens", "1", "--template-variable", "enable_thinking=true"]
    assert main([*command, "--template-variable", "today=2024-07-26", "--template-variable", "style=very brief"]) == 0
    expected = {"enable_thinking": True, "today": "2024-07-26", "style": "very brief"}
    assert read_settings("drawings/0000.png")["template_variables"] == expected
    assert main(["generate", "model", "--settings", "drawings/0000.png"]) == 0
    assert read_settings("drawings/0001.png")["template_variables"] == expected
    capsys.readouterr()
    for arguments, message in (
        (["x", "--template-variable", "a=1"], "--template-variable needs a conversation; add --chat"),
        (["x", "--chat", "--template-variable", "a"], "--template-variable must be NAME=VALUE"),
        (["x", "--chat", "--template-variable", "today=x"], "template_variables.today"),
    ):
        assert main(["generate", "model", *arguments]) == 2
        assert message in capsys.readouterr().err
