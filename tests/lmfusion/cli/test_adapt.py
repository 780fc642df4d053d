"""`lmfusion adapt`: from an LLM to a saved model, in one command."""

import pytest

from lmfusion.cli import main
from lmfusion.model.modeling import LMFusion

IMAGES = ["--channels", "1", "--image-size", "8", "--patch-coder", "linear"]


def test_adapt_saves_the_model_that_was_asked_for(tiny_llama, tmp_path, capsys):
    output = tmp_path / "models" / "digits"
    options = ["--image-width", "16", "--image-ffn-width", "24", "--prediction", "v_prediction", "--patch-size", "4"]
    assert main(["adapt", str(tiny_llama), str(output), *IMAGES, *options]) == 0
    assert "4 tokens per image" in capsys.readouterr().out
    model = LMFusion.from_pretrained(output)
    assert (model.config.image.hidden_size, model.config.image.intermediate_size) == (16, 24)
    assert model.config.image.patch_coder.patch_size == 4
    assert (model.config.codec.channels, model.config.codec.image_size) == (1, 8)
    assert model.config.diffusion.prediction_type == "v_prediction"
    assert model.tokenizer("a")["input_ids"][0] == model.tokenizer.bos_token_id


def test_full_width_by_default(tiny_llama, tmp_path):
    main(["adapt", str(tiny_llama), str(tmp_path / "full"), *IMAGES, "--separation", "shallow"])
    model = LMFusion.from_pretrained(tmp_path / "full")
    assert model.config.image_hidden_size == 32 and model.config.image.separation == "shallow"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-width", "-3"], "image.hidden_size must be a whole number"),
        (["--separation", "none", "--image-width", "16"], "share weights"),
        (["--codec", "autoencoder_kl"], "needs a path"),
        (["--patch-size", "3"], "must be multiples of the patch size 3"),
    ],
)
def test_bad_arguments_end_in_one_line(tiny_llama, tmp_path, capsys, arguments, message):
    assert main(["adapt", str(tiny_llama), str(tmp_path / "m"), *IMAGES, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lmfusion: error: ") and message in error
    assert not (tmp_path / "m").exists()


def test_a_base_that_is_not_there(tmp_path, capsys):
    assert main(["adapt", str(tmp_path / "no llm"), str(tmp_path / "m")]) == 2
    assert "no base model at" in capsys.readouterr().err
