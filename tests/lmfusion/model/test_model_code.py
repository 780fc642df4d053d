"""Model folders with code: none of it runs, nobody is asked about it, and none is copied into a saved model."""

import io
import json
import shutil

import diffusers
import pytest

from lmfusion.cli import main
from lmfusion.conversion import load_base
from lmfusion.conversion.vlm import read_image_processor
from lmfusion.evaluation.metrics.clip import load_clip
from lmfusion.model.codec import CodecConfig, load_codec
from lmfusion.model.modeling import LMFusion
from lmfusion.model.verification import verify
from tests.lmfusion.conversion.gguf_files import byte_level_metadata, tiny_gguf
from tests.lmfusion.evaluation.metrics.clip_folder import save_clip
from tests.lmfusion.vlms import save_vlm

IMAGES = ["--codec", "pixels", "--channels", "1", "--image-size", "8", "--patch-coder", "linear"]
CODE = """
from pathlib import Path
(Path(__file__).parent / "it-ran").touch()
class EvilTokenizer: pass
class EvilProcessor: pass
"""
OF_TOKENIZER = {
    "tokenizer_config.json": {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]},
    }
}
OF_PROCESSOR = {
    "image_processor_type": "EvilProcessor",
    "auto_map": {"AutoImageProcessor": "evil.EvilProcessor", "AutoProcessor": "evil.EvilProcessor"},
}


@pytest.fixture(autouse=True)
def somebody_who_says_yes(monkeypatch):
    """Whoever asks gets a yes; transformers caches code that it is to run where the test can see it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))

    def asked(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)


@pytest.fixture
def base(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "base")


def plant(folder, files=OF_TOKENIZER):
    """Evil code in `folder`, and settings that name it."""
    (folder / "evil.py").write_text(CODE)
    for name, settings in files.items():
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | settings))
    return folder


def test_a_base_whose_tokenizer_is_code(base, tmp_path, capsys):
    plant(base)
    assert main(["adapt", str(base), str(tmp_path / "out"), *IMAGES]) != 0
    error = capsys.readouterr().err
    assert "tokenizer_config.json must not name code of its own (auto_map)" in error and "runs no code" in error
    assert not (tmp_path / "out").exists()


def test_a_saved_model_whose_tokenizer_is_code(base, tmp_path, capsys):
    saved = tmp_path / "saved"
    assert main(["adapt", str(base), str(saved), *IMAGES]) == 0
    plant(saved)
    assert main(["generate", str(saved), "hi", "--text"]) != 0
    assert "must not name code of its own" in capsys.readouterr().err


def test_files_beside_a_gguf_file_are_no_matter(tmp_path):
    path = tiny_gguf(tmp_path / "llm.gguf", byte_level_metadata())
    expected = load_base(path).read_tokenizer()("Hello 2024").input_ids
    plant(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    assert load_base(path).read_tokenizer()("Hello 2024").input_ids == expected
    assert main(["adapt", str(path), str(tmp_path / "out"), *IMAGES]) == 0
    assert not list((tmp_path / "out").glob("*.py"))
    assert not any("auto_map" in file.read_text() for file in (tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("inside", [False, True])
def test_an_image_processor_that_is_code(tmp_path, name, inside):
    save_vlm(tmp_path)
    plant(tmp_path, {name: {"image_processor": OF_PROCESSOR} if inside else OF_PROCESSOR})
    with pytest.raises(ValueError, match=f"{name} must not name code of its own"):
        read_image_processor(tmp_path)


def test_a_clip_whose_tokenizer_is_code(tmp_path):
    save_clip(tmp_path)
    load_clip(tmp_path)
    plant(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must not name code of its own"):
        load_clip(tmp_path)


def test_a_codec_that_names_code(tmp_path):
    options = {"in_channels": 1, "out_channels": 1, "encoder_block_out_channels": (8, 8), "latent_channels": 2}
    blocks = {"decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    diffusers.AutoencoderTiny(**options, **blocks).save_pretrained(tmp_path)
    plant(tmp_path, {"config.json": {"auto_map": {"AutoModel": "evil.Evil"}}})
    with pytest.raises(ValueError, match=r"config\.json must not name code of its own"):
        load_codec(CodecConfig("autoencoder_tiny", path=str(tmp_path), channels=1, image_size=8))


KERNEL = "someone/kernels"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_configuration_names_are_not_fetched(base, tmp_path, key):
    """transformers would fetch the repository and import it."""
    plant(base, {"config.json": {key: KERNEL, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}})
    model = LMFusion.from_llm(base, {"hidden_size": 16}, {"kind": "pixels", "channels": 1, "image_size": 4})
    assert verify(model).text_identical
    model.save_pretrained(tmp_path / "saved")
    written = (tmp_path / "saved" / "config.json").read_text()
    assert KERNEL not in written and "evil" not in written
    plant(tmp_path / "saved", {"config.json": {key: KERNEL}})
    LMFusion.from_pretrained(tmp_path / "saved")


def test_kernels_that_a_vlms_encoder_names_are_not_fetched(tmp_path):
    save_vlm(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["attn_implementation"] = config["text_config"]["attn_implementation"] = KERNEL
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = LMFusion.from_vlm(tmp_path, {"hidden_size": 16}, {"kind": "pixels", "channels": 1, "image_size": 4})
    assert KERNEL not in json.dumps(model.config.to_dict())


def test_kernels_that_a_clip_names_are_not_fetched(tmp_path):
    save_clip(tmp_path)
    plant(tmp_path, {"config.json": {"attn_implementation": KERNEL}})
    load_clip(tmp_path)
