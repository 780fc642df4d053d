"""Mistral's large vocabularies, which transformers before version 5 converted with another model's pattern."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmfusion.conversion.tokenizer import read_tokenizer

WRONG = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = "AbcDEF 2024"
MISTRALS = ["Abc", "DEF", " ", "2", "0", "2", "4"]
OTHERS = ["AbcDEF", " ", "202", "4"]


@pytest.fixture(scope="module")
def tokenizer():
    """Of more than 100,000 tokens, by which transformers knows them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *(f"<SPECIAL_{i}>" for i in range(100_000))]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    split = pre_tokenizers.Split(Regex(WRONG), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def pieces(tokenizer):
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    return [TEXT[start:end] for _, (start, end) in split]


def save(tokenizer, folder, config, tokenizer_class=None, **settings):
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    changes = settings if tokenizer_class is None else {**settings, "tokenizer_class": tokenizer_class}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize("version", ["4.46.0", "4.57.1", None])
def test_saved_before_version_5(tokenizer, tmp_path, version, tokenizer_class, caplog):
    config = {"model_type": "mistral", "transformers_version": version}
    read = read_tokenizer(save(tokenizer, tmp_path / "base", config, tokenizer_class))
    assert pieces(read) == MISTRALS and read.decode(read(TEXT).input_ids, skip_special_tokens=True) == TEXT
    assert "incorrect regex" not in caplog.text
    read.save_pretrained(tmp_path / "saved")  # as with a model of ours
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": "lmfusion"}))
    assert pieces(read_tokenizer(tmp_path / "saved")) == MISTRALS
    assert read_tokenizer(tmp_path / "saved")(TEXT).input_ids == read(TEXT).input_ids


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "transformers_version": "5.0.0"},
        {"model_type": "llama", "transformers_version": "4.46.0"},
    ],
)
def test_others_are_left_alone(tokenizer, tmp_path, config):
    folder = save(tokenizer, tmp_path, config)
    assert pieces(read_tokenizer(folder)) == OTHERS == pieces(AutoTokenizer.from_pretrained(folder))


def test_what_the_folder_says_counts(tokenizer, tmp_path):
    """A Mistral architecture with a tokenizer of another model."""
    config = {"model_type": "mistral", "transformers_version": "4.46.0"}
    folder = save(tokenizer, tmp_path, config, fix_mistral_regex=False)
    assert pieces(read_tokenizer(folder)) == OTHERS
