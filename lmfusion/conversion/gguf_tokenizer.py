"""Reads tokenizers of GGUF files, with the same token ids and end tokens as in llama.cpp."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lmfusion.conversion.architectures import unsupported

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""Token types."""
_DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""Ids of a SentencePiece vocabulary whose file does not give them."""

_ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = rf"{_ENDINGS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"


def _words(digits: str) -> str:
    """Llama 3's pattern, and those that differ from it only in `digits`."""
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    return rf"(?i:{_ENDINGS})|{word}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"


def _cased_words(ending: str, digits: str) -> str:
    """Patterns in which a capital letter begins a word: Mistral's and GPT-4o's."""
    first, upper = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = rf"{first}{upper}*{lower}+{ending}|{first}{upper}+{lower}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"


_LLAMA3, _QWEN2 = _words(r"\p{N}{1,3}"), _words(r"\p{N}")
_TEKKEN, _GPT4O = _cased_words("", r"\p{N}"), _cased_words(f"(?i:{_ENDINGS})?", r"\p{N}{1,3}")
_DEFAULT = (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}")
_PATTERNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("llama3 llama-v3 llama-bpe falcon3 pixtral midm-2.0 dbrx smaug-bpe", (_LLAMA3,)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2", (_QWEN2,)),
    ("tekken", (_TEKKEN,)),
    ("gpt-4o kanana2", (_GPT4O,)),
    ("gpt-2 gigachat a.x-4.0 mellum exaone4 olmo mpt jais trillion", (_GPT2,)),
    ("smollm starcoder refact command-r codeshell minerva-7b mellum2", (r"\p{N}", _GPT2)),
    ("default", _DEFAULT),
)
PRE_TOKENIZERS = {name: patterns for names, patterns in _PATTERNS for name in names.split()}
"""Patterns that split a text, one after the other, by the name of the pre-tokenizer."""
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "tekken")
"""Pre-tokenizers for which a word in the vocabulary is one token, whatever the merges, and bos comes first unless the
file says otherwise."""

_END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
)  # fmt: skip
"""Tokens whose text ends an answer in llama.cpp. </s> does so too, but it is a plain word in some vocabularies: here it
ends an answer only if it is a control token."""
_END_KEYS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_NOT_AN_END = (
    ("<|end|>", ("<|return|>", "<|call|>")),
    ("<|end|>", ("<|flush|>", "<|calls|>")),
    ("</s>", ("<|tool_response>",)),
)
"""Tokens that do not end an answer if all of the others are in the vocabulary, too."""


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Ids of bos, eos, unknown and padding, if the file has them."""
    found = dict(_DEFAULT_IDS) if metadata.get(_PREFIX + "model") == "llama" else {}
    named = {name: _token_id(metadata, name) for name in ("bos", "eos", "unknown", "padding")}
    return found | {name: token_id for name, token_id in named.items() if token_id is not None}


def _token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    value = metadata.get(f"{_PREFIX}{name}_token_id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{_PREFIX}{name}_token_id must be a token id, got {value!r:.80}")
    return value


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end an answer, eos first: those that the file gives, and those of tokens whose text ends one."""
    ids = [special_ids(metadata).get("eos"), *(_token_id(metadata, name) for name in _END_KEYS)]
    tokens, types = _list(metadata, "tokens", []), _list(metadata, "token_type", [])
    id_of = {token: token_id for token_id, token in enumerate(tokens)}
    ids += [id_of.get(name) for name in _END_NAMES]
    plain_end = id_of.get("</s>")
    if plain_end is not None and plain_end < len(types) and types[plain_end] == _CONTROL:
        ids.append(plain_end)
    for name, others in _NOT_AN_END:
        if all(other in id_of for other in others):
            ids = [token_id for token_id in ids if token_id != id_of.get(name)]
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def read_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Any:
    """The tokenizer in the file, with its chat template; None where there is none.

    Raises ValueError for one that is damaged, and for a kind or a pre-tokenizer that is not supported.
    """
    kind = metadata.get(_PREFIX + "model")
    if kind is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(unsupported(str(path), f"a tokenizer of type {kind!r}", "'gpt2' and 'llama'"))
    try:
        tokens = _tokens(metadata)
        backend = _byte_level(path, metadata, tokens) if kind == "gpt2" else _sentencepiece(metadata, tokens)
        return _finished(metadata, tokens, backend)
    except _UnsupportedError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception for a vocabulary that it rejects
        raise ValueError(f"the tokenizer in {path} is damaged: {error}") from error


class _UnsupportedError(ValueError):
    """The tokenizer is intact, but of a kind that is not supported."""


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_list(metadata, "tokens"))]
    if not tokens:
        raise ValueError("its vocabulary is empty")
    if len(set(tokens)) < len(tokens):
        [(twice, _)] = Counter(tokens).most_common(1)
        raise ValueError(f"it holds the token {twice!r:.80} more than once")
    return tokens


def _list(metadata: Mapping[str, Any], name: str, default: list[Any] | None = None) -> list[Any]:
    value = metadata.get(_PREFIX + name, default)
    if not isinstance(value, list):
        raise ValueError(f"it lacks the list {_PREFIX}{name}")
    kind: Any = str if name in ("tokens", "merges") else (int, float)
    if not all(isinstance(item, kind) for item in value):
        raise ValueError(f"{_PREFIX}{name} must be a list of {'texts' if kind is str else 'numbers'}")
    return value


def _byte_level(path: Path, metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    pre = metadata.get(_PREFIX + "pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise _UnsupportedError(
            f"{path} uses the pre-tokenizer {pre!r} ({_PREFIX}pre), which is not supported; take the model's folder in "
            "Hugging Face's form instead, whose tokenizer.json says how texts are split. Supported: "
            + ", ".join(PRE_TOKENIZERS)
        )
    merges = [_merge(merge) for merge in dict.fromkeys(_list(metadata, "merges"))]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merge(merge: str) -> tuple[str, str]:
    space = merge.find(" ", 1)
    if space < 0:
        raise ValueError(f"its merge {merge!r:.80} has one part")
    return merge[:space], merge[space + 1 :]


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    scores, types = _list(metadata, "scores"), _list(metadata, "token_type", [])
    if len(scores) < len(tokens):
        raise ValueError(f"it holds {len(tokens)} tokens, but {len(scores)} scores")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    unmerged = {i for i, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL, _BYTE)}
    merges = []
    for token, token_id in vocabulary.items():
        if token_id in unmerged:
            continue
        parts = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [(scores[token_id], a, b) for a, b in parts if a in vocabulary and b in vocabulary]
    merges.sort(key=lambda merge: -merge[0])  # stable: for equal scores, the lower id comes first
    unknown = special_ids(metadata)["unknown"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(a, b) for _, a, b in merges],
            unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # A space before every piece of text: the first one, and each one after a control token
    has_prefix = bool(metadata.get(_PREFIX + "add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if has_prefix else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return tokenizer


def _finished(metadata: Mapping[str, Any], tokens: Sequence[str], tokenizer: Tokenizer) -> Any:
    """`tokenizer` with its control tokens, and with bos and eos around texts if the file says so."""
    ends = {tokens[token_id] for token_id in end_tokens(metadata) if 0 <= token_id < len(tokens)}
    types = dict(zip(tokens, _list(metadata, "token_type", []), strict=False))
    control = [token for token in tokens if token in ends or types.get(token) in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    plain = [token for token in tokens if types.get(token) == _USER_DEFINED and token not in ends]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    names = {}
    for name, token_id in special_ids(metadata).items():
        if not 0 <= token_id < len(tokens):
            raise ValueError(f"its {name}_token_id must be from 0 to {len(tokens) - 1}, got {token_id}")
        names[name] = tokens[token_id]
    is_first = metadata[_PREFIX + "model"] == "llama" or metadata.get(_PREFIX + "pre") in _WHOLE_WORDS
    around = {
        "bos": bool(metadata.get(_PREFIX + "add_bos_token", is_first)),
        "eos": bool(metadata.get(_PREFIX + "add_eos_token", False)),
    }
    for name, is_added in around.items():
        if is_added and name not in names:
            raise ValueError(f"it puts {name} around texts, but has no {_PREFIX}{name}_token_id")
    before, after = ([names[name]] if is_added else [] for name, is_added in around.items())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
    )
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=names.get("bos"),
        eos_token=names.get("eos"),
        unk_token=names.get("unknown"),
        pad_token=names.get("padding"),
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
