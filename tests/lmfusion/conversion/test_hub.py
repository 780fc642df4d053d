"""Bases from the hub: exactly the files that are read are downloaded. A folder replaces the repository."""

import json
import shutil

import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmfusion.conversion import load_base
from lmfusion.model.modeling import LMFusion
from tests.lmfusion.vlms import CODEC, IMAGE, save_vlm

OTHERS = (
    "README.md",
    "consolidated.safetensors",
    "params.json",
    "original/consolidated.00.pth",
    "original/tokenizer.model",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.fp16.safetensors",
    "adapter_model.safetensors",
    "onnx/model.onnx",
    "onnx/config.json",
    "flax_model.msgpack",
    "evil.py",
    "tekken.json",
    "training_args.json",
    "video_preprocessor_config.json",
)
READ = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


class Hub:
    """snapshot_download of a repository that lies in a folder."""

    def __init__(self, folder, cache):
        self.repository = folder
        self.snapshot = cache / ("0123456789abcdef" * 3)[:40]
        for name in OTHERS:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}")

    def snapshot_download(self, name, *, revision=None, allow_patterns):
        assert name == "someone/llm" and revision in (None, self.snapshot.name)
        files = [str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (self.snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / file, self.snapshot / file)
        return str(self.snapshot)

    @property
    def fetched(self):
        return {str(path.relative_to(self.snapshot)) for path in self.snapshot.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tiny_llama, tmp_path, monkeypatch):
    hub = Hub(shutil.copytree(tiny_llama, tmp_path / "repository"), tmp_path)
    monkeypatch.setattr("lmfusion.conversion.hub.snapshot_download", hub.snapshot_download)
    return hub


def shard(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    names = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(names) > 1
    return names | {"model.safetensors.index.json"}


def test_a_single_file_of_weights(hub):
    base = load_base("someone/llm")
    assert base.name == "someone/llm" and base.read_tokenizer() is not None
    assert hub.fetched == READ | {"model.safetensors"}


def test_shards(hub):
    files = shard(hub.repository)
    expected = load_file(hub.repository / "model.safetensors")
    (hub.repository / "model.safetensors").unlink()
    (hub.repository / "model-00099-of-00099.safetensors").write_text("which no index lists")
    assert len(load_base("someone/llm").tensors) == len(expected)
    assert hub.fetched == READ | files


def test_a_single_file_is_preferred_to_shards(hub):
    """As it is when a folder is read."""
    shard(hub.repository)
    load_base("someone/llm")
    assert hub.fetched == READ | {"model.safetensors", "model.safetensors.index.json"}


def test_a_tokenizer_of_vocabulary_and_merges(hub):
    """As older GPT-2 tokenizers are saved."""
    vocabulary = json.loads((hub.repository / "tokenizer.json").read_text())["model"]["vocab"]
    vocabulary["ab"] = vocabulary.pop("\u0142")
    (hub.repository / "tokenizer.json").unlink()
    (hub.repository / "vocab.json").write_text(json.dumps(vocabulary))
    (hub.repository / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (hub.repository / "tokenizer_config.json").write_text(json.dumps(settings))
    (hub.repository / "special_tokens_map.json").write_text("{}")
    tokenizer = load_base("someone/llm").read_tokenizer()
    assert tokenizer.tokenize("abc") == ["ab", "c"]
    assert {"vocab.json", "merges.txt", "special_tokens_map.json"} < hub.fetched


def test_a_vlm(tmp_path, monkeypatch):
    save_vlm(tmp_path / "repository")
    hub = Hub(tmp_path / "repository", tmp_path)
    (hub.repository / "preprocessor_config.json").write_text(
        json.dumps(json.loads((hub.repository / "processor_config.json").read_text())["image_processor"])
    )
    monkeypatch.setattr("lmfusion.conversion.hub.snapshot_download", hub.snapshot_download)
    model = LMFusion.from_vlm("someone/llm", IMAGE, CODEC)
    assert model.tokenizer.chat_template and model.vision.image_processor is not None
    processor = {"preprocessor_config.json", "processor_config.json", "chat_template.jinja"}
    assert hub.fetched == READ | processor | {"model.safetensors"}


@pytest.mark.parametrize("names", [["*"], ["../model.safetensors"], ["consolidated.pth"]])
def test_an_index_that_lists_what_is_no_shard(hub, names):
    (hub.repository / "model.safetensors").unlink()
    index = {"weight_map": {str(i): name for i, name in enumerate(names)}}
    (hub.repository / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        load_base("someone/llm")


def test_shards_are_no_patterns(hub):
    (hub.repository / "model.safetensors").unlink()
    index = {"weight_map": {"x": "*.safetensors"}}
    (hub.repository / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"\*\.safetensors is missing"):
        load_base("someone/llm")
    assert not any(name.endswith(".safetensors") for name in hub.fetched)
