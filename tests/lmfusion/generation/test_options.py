"""The table of options agrees with everything that is made from it."""

from dataclasses import fields

import pytest

from lmfusion.cli import main
from lmfusion.generation.options import OPTIONS, GenerationOptions


def test_it_has_every_field_with_its_default():
    assert list(OPTIONS) == [item.name for item in fields(GenerationOptions)]
    defaults = GenerationOptions()
    assert all(getattr(defaults, name) == option.default for name, option in OPTIONS.items())


def test_the_command_line_has_every_flag(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    words = capsys.readouterr().out.split()
    assert {option.flag for option in OPTIONS.values() if option.flag is not None} <= set(words)


def test_a_chat_request_has_every_option():
    pytest.importorskip("pydantic")
    from lmfusion.serving.http.requests import OPENAI_NAMES
    from lmfusion.serving.http.schema import SAME_NAMES, ChatRequest

    names = {option.request_name for option in OPTIONS.values() if option.request_name is not None}
    assert names <= set(ChatRequest.model_fields)
    assert {*SAME_NAMES, *OPENAI_NAMES.values()} == names
    assert OPENAI_NAMES["max_new_tokens"] == "max_tokens" and "callback_on_step_end" not in SAME_NAMES


@pytest.mark.parametrize("name", ["num_steps", "top_p", "guidance_scale", "image_guidance_scale", "seed"])
def test_a_number_is_checked_at_both_ends(name):
    option = OPTIONS[name]
    option.check(option.least)
    with pytest.raises(ValueError, match=f"{name} must be {option.allowed}, got"):
        option.check(option.least - 1)
    if option.most is not None:
        option.check(option.most)
        with pytest.raises(ValueError, match=f"{name} must be {option.allowed}, got"):
            option.check(option.most + 1)


@pytest.mark.parametrize(("name", "value"), [("num_steps", 5.0), ("num_steps", True), ("top_p", "0.5"), ("seed", None)])
def test_values_of_another_type_are_not_converted(name, value):
    with pytest.raises(ValueError, match=name):
        OPTIONS[name].check(value)
