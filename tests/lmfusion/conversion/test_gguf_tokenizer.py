"""Tokenizers in GGUF files: llama.cpp's token ids and end tokens, and errors for what is not supported."""

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from lmfusion.conversion import load_base
from lmfusion.conversion.gguf_tokenizer import PRE_TOKENIZERS, end_tokens
from lmfusion.generation.prompt import end_token_ids
from lmfusion.model.modeling import LMFusion
from tests.lmfusion.conversion.gguf_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    byte_level_metadata,
    tiny_gguf,
)

IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}
TEXT = "AbcDEF 2024 DON'T  x, I'll\n\n  go!\n"
SPLITS = {
    "llama-bpe": ["AbcDEF", " ", "202", "4", " DON", "'T", " ", " x", ",", " I", "'ll", "\n\n", " ", " go", "!\n"],
    "qwen2": ["AbcDEF", " ", "2", "0", "2", "4", " DON", "'T", " ", " x", ",", " I", "'ll", "\n\n", " ", " go", "!\n"],
    "tekken": [
        *["Abc", "DEF", " ", "2", "0", "2", "4", " DON", "'T", " ", " x", ",", " I", "'ll", "\n\n", " ", " go", "!\n"]
    ],
    "gpt-4o": ["Abc", "DEF", " ", "202", "4", " DON'T", " ", " x", ",", " I'll", "\n\n", " ", " go", "!\n"],
    "gpt-2": [
        *["AbcDEF", " 2024", " DON", "'", "T", " ", " x", ",", " I", "'ll", "\n\n ", " go", "!", "\n"]
    ],
    "smollm": [
        *["AbcDEF", " ", "2", "0", "2", "4", " DON", "'", "T", " ", " x", ",", " I", "'ll", "\n\n ", " go", "!", "\n"]
    ],
    "default": [
        *["AbcDEF", " ", "202", "4", " DON", "'", "T", " ", " x", ",", " I", "'", "ll", "\n\n ", " go", "!", "\n"]
    ],
}  # fmt: skip
ALIKE = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "stablelm2": "qwen2",
    "olmo": "gpt-2",
    "starcoder": "smollm",
    "command-r": "smollm",
    None: "default",
}


def read(tmp_path, metadata):
    return load_base(tiny_gguf(tmp_path / "llm.gguf", metadata)).read_tokenizer()


def pieces(tokenizer, text):
    """How the tokenizer splits `text` before it merges anything."""
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in split]


@pytest.mark.parametrize("pre", [*SPLITS, *ALIKE])
def test_texts_are_split_as_the_pre_tokenizer_says(tmp_path, pre):
    tokenizer = read(tmp_path, byte_level_metadata(pre, bos_token_id=0))
    assert pieces(tokenizer, TEXT) == SPLITS[ALIKE.get(pre, pre)]
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert len(ids) == len(TEXT.encode()) and tokenizer.decode(ids) == TEXT
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_patterns_are_those_of_the_models_own_tokenizers():
    """transformers has them where it has the models."""
    theirs = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    shared = [name for name in PRE_TOKENIZERS if name in theirs]
    assert {"llama-bpe", "qwen2", "tekken", "gpt-4o"} <= set(shared)
    sample = f"{TEXT} ÉCOLE écoleÀla \u0301x 12345 ½ ٣٤٥ /path/To\r\n\t... 日本語テキスト123 ﬁ Ǆx"
    for name in shared:
        expected = pre_tokenizers.Split(_regex(theirs[name]), "isolated").pre_tokenize_str(sample)
        [pattern] = PRE_TOKENIZERS[name]
        assert pre_tokenizers.Split(_regex(pattern), "isolated").pre_tokenize_str(sample) == expected, name


def _regex(pattern):
    from tokenizers import Regex

    return Regex(pattern)


@pytest.mark.parametrize("pre", ["deepseek-llm", "deepseek-coder", "deepseek-v3", "viking", "bloom", "kimi-k2", "new"])
def test_other_pre_tokenizers_are_named(tmp_path, pre):
    with pytest.raises(ValueError, match=rf"llm\.gguf uses the pre-tokenizer '{pre}'.*Supported: .*llama-bpe"):
        read(tmp_path, byte_level_metadata(pre))


@pytest.mark.parametrize(("pre", "is_whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_words_of_the_vocabulary_that_no_merges_make(tmp_path, pre, is_whole):
    metadata = byte_level_metadata(pre, words=["hello"], bos_token_id=0)
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:1]
    tokenizer = read(tmp_path, metadata)
    tokens = tokenizer.tokenize("hello", add_special_tokens=False)
    assert tokens == (["hello"] if is_whole else ["he", "l", "l", "o"])


@pytest.mark.parametrize(
    ("pre", "settings", "before", "after"),
    [
        ("gpt-2", {}, False, False),
        ("qwen2", {"add_bos_token": False}, False, False),
        ("qwen2", {"add_bos_token": True}, True, False),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("tekken", {}, True, False),
        ("gpt-2", {"add_eos_token": True}, False, True),
    ],
)
def test_bos_and_eos_around_a_text(tmp_path, pre, settings, before, after):
    metadata = byte_level_metadata(pre, control=("</s>", "<s>"), **settings)
    tokens = metadata["tokenizer.ggml.tokens"]
    bos, eos = tokens.index("<s>"), tokens.index("</s>")
    tokenizer = read(tmp_path, metadata | {"tokenizer.ggml.bos_token_id": bos})
    assert tokenizer("a").input_ids == [bos] * before + [tokens.index("a")] + [eos] * after
    assert tokenizer("a", add_special_tokens=False).input_ids == [tokens.index("a")]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_bos_that_is_wanted_and_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"it puts bos around texts, but has no tokenizer\.ggml\.bos_token_id"):
        read(tmp_path, byte_level_metadata("llama-bpe"))


def test_control_and_user_defined_tokens(tmp_path):
    """Also such as are written with other characters than a byte-level vocabulary, as DeepSeek's are."""
    metadata = byte_level_metadata(
        "deepseek-r1-qwen", control=("<｜end▁of▁sentence｜>", "<｜User｜>"), plain=("<think>",)
    )
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = read(tmp_path, metadata)
    text = "<｜User｜>a<think>"
    assert tokenizer(text).input_ids == [tokens.index(token) for token in ("<｜User｜>", "a", "<think>")]
    spelled = tokenizer(text, split_special_tokens=True).input_ids
    assert tokens.index("<think>") in spelled and tokens.index("<｜User｜>") not in spelled
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "a<think>"


def test_the_chat_template(tmp_path):
    metadata = byte_level_metadata() | {
        "tokenizer.chat_template": "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    }
    tokenizer = read(tmp_path, metadata)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"


# Damaged files


def without(metadata, key):
    return {name: value for name, value in metadata.items() if name != f"tokenizer.ggml.{key}"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: without(m, "merges"), r"it lacks the list tokenizer\.ggml\.merges"),
        (lambda m: without(without(m, "tokens"), "eos_token_id"), r"it lacks the list tokenizer\.ggml\.tokens"),
        (lambda m: m | {"tokenizer.ggml.merges": ["a b", "zz y"]}, "vocabulary"),
        (lambda m: m | {"tokenizer.ggml.merges": ["ab"]}, "its merge 'ab' has one part"),
        (lambda m: m | {"tokenizer.ggml.merges": [1, 2]}, r"tokenizer\.ggml\.merges must be a list of texts"),
        (lambda m: m | {"tokenizer.ggml.tokens": [*m["tokenizer.ggml.tokens"][:-1], "a"]}, "the token 'a' more than"),
    ],
)
def test_damaged_vocabularies_are_named(tmp_path, damage, message):
    with pytest.raises(ValueError, match=rf"the tokenizer in .*llm\.gguf is damaged: .*{message}"):
        read(tmp_path, damage(byte_level_metadata()))


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "gemma4", "no_such"])
def test_other_kinds_of_tokenizers_are_named(tmp_path, kind):
    with pytest.raises(ValueError, match=f"llm.gguf uses a tokenizer of type '{kind}'.*supported: 'gpt2' and 'llama'"):
        read(tmp_path, byte_level_metadata() | {"tokenizer.ggml.model": kind})


def test_special_ids_beyond_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match=r"eos_token_id must be a token id .* got 4000"):
        read(tmp_path, byte_level_metadata() | {"tokenizer.ggml.eos_token_id": 4000})
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.eot_token_id must be a token id, got 'x'"):
        read(tmp_path, byte_level_metadata() | {"tokenizer.ggml.eot_token_id": "x"})


# SentencePiece


def sentencepiece_metadata(words=("▁he", "▁hell", "lo", "▁▁"), **settings):
    """Bytes, letters, pieces and `words`, of which the first are the likeliest."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    scored = [*words, "▁h", "el", "ll", "▁", *letters, "<|user|>", "<think>"]
    types += [NORMAL] * (len(scored) - 2) + [CONTROL, USER_DEFINED]
    scores = [0.0] * len(tokens) + [-float(i) for i in range(1, len(scored) + 1)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + scored,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        **{f"tokenizer.ggml.{name}": value for name, value in settings.items()},
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", ["<s>", "▁he", "l", "lo"]),  # "▁h", then "▁he" of the highest score, then "lo"
        (" hello", ["<s>", "▁▁", "h", "el", "lo"]),  # a space is put before all, whatever the text begins with
        ("a\u00e9", ["<s>", "▁", "a", "<0xC3>", "<0xA9>"]),
        ("a<|user|>b", ["<s>", "▁", "a", "<|user|>", "▁", "b"]),  # and after a control token
        ("a<think>b", ["<s>", "▁", "a", "<think>", "▁", "b"]),
        ("", ["<s>"]),
    ],
)
def test_sentencepiece(tmp_path, text, expected):
    tokenizer = read(tmp_path, sentencepiece_metadata())
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == expected
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text).input_ids == tokenizer(text).input_ids


def test_sentencepiece_without_a_space_in_front(tmp_path):
    tokenizer = read(tmp_path, sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    ids = tokenizer("he  a").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["h", "e", "▁▁", "a"] and tokenizer.decode(ids) == "he  a"


def test_sentencepiece_of_which_scores_are_missing(tmp_path):
    with pytest.raises(ValueError, match=r"damaged: it lacks the list tokenizer\.ggml\.scores"):
        read(tmp_path, without(sentencepiece_metadata(), "scores"))
    with pytest.raises(ValueError, match="tokens, but 2 scores"):
        read(tmp_path, sentencepiece_metadata() | {"tokenizer.ggml.scores": [0.0, 1.0]})


# Ends of an answer


@pytest.mark.parametrize(
    ("control", "named", "expected"),
    [
        (["<eos>", "<|im_end|>"], {}, ["<eos>", "<|im_end|>"]),
        (["<a>", "<b>", "<c>"], {"eot": "<b>", "eom": "<c>"}, ["<a>", "<b>", "<c>"]),
        (["<a>", "<|eot_id|>", "<|eom_id|>", "<b>"], {}, ["<a>", "<|eot_id|>", "<|eom_id|>"]),
        (["<a>", "<end_of_turn>"], {}, ["<a>", "<end_of_turn>"]),
        (["<a>", "<|end|>", "<|endoftext|>"], {}, ["<a>", "<|end|>", "<|endoftext|>"]),
        (["<a>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], {}, None),
        (["<a>", "<b>"], {"fim_pad": "<b>"}, ["<a>", "<b>"]),
        (["<|return|>", "<|call|>", "<|end|>"], {}, ["<|return|>", "<|call|>"]),  # where <|end|> ends a part alone
        (["<a>", "</s>"], {}, ["<a>", "</s>"]),
    ],
)
def test_all_ends_that_llama_cpp_knows(tmp_path, control, named, expected):
    metadata = byte_level_metadata(control=control)
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata |= {f"tokenizer.ggml.{name}_token_id": tokens.index(token) for name, token in named.items()}
    model = LMFusion.from_llm(tiny_gguf(tmp_path / "llm.gguf", metadata), IMAGE, CODEC)
    ends = {tokens.index(token) for token in (control if expected is None else expected)}
    assert end_token_ids(model) == ends
    model.save_pretrained(tmp_path / "saved")
    assert end_token_ids(LMFusion.from_pretrained(tmp_path / "saved")) == ends


def test_plain_words_that_look_like_ends():
    """</s> is a word of HTML in some vocabularies."""
    metadata = byte_level_metadata(control=("<a>",), plain=("</s>",))
    assert end_tokens(metadata) == [metadata["tokenizer.ggml.tokens"].index("<a>")]


def test_ends_of_sentencepiece_without_keys(tmp_path):
    path = tiny_gguf(tmp_path / "llm.gguf", sentencepiece_metadata())
    assert load_base(path).config.eos_token_id == 2 and load_base(path).config.bos_token_id == 1
