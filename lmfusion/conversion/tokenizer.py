"""Reads tokenizers from a folder without running code in it, and checks them against the LLM's vocabulary."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lmfusion.utils.json_files import read_json_object

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with none of these has no tokenizer."""
VOCABULARY_FILES = (*_TOKENIZER_FILES, "merges.txt", "added_tokens.json")
"""What the token ids of a text depend on. Chat templates are in other files, and may be edited."""
TOKENIZER_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""The other files that transformers saves with a tokenizer."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Of a vision-language model's image processor."""
_FILES_WITH_CLASSES = ("tokenizer_config.json", *PROCESSOR_FILES)
"""What may name code, in a key `auto_map`."""


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer saved in `folder`; None where there is none.

    Raises ValueError for a tokenizer that is damaged, or that needs code in the folder.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    refuse_code(folder)
    options: dict[str, Any] = {}
    settings = _read_settings(folder / "tokenizer_config.json")
    if _read_settings(folder / "config.json").get("model_type") == "mistral" and "fix_mistral_regex" not in settings:
        # Before version 5, transformers converted Mistral's large vocabularies with another model's pattern. It detects
        # them by their size and the version in config.json, and restores Mistral's pattern if this option is set.
        options["fix_mistral_regex"] = True
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers and tokenizers raise many kinds, and do not name the file
        raise ValueError(f"the tokenizer in {folder} is damaged: {error}") from error


def refuse_code(folder: Path, names: Sequence[str] = _FILES_WITH_CLASSES) -> None:
    """Raise ValueError where one of the files `names` in `folder` refers to code in the folder.

    transformers would ask whether to run it, or read the files with another class than they are meant for.
    """
    for name in names:
        if _names_code(_read_settings(folder / name)):
            raise ValueError(
                f"{folder / name} must not name code of its own (auto_map), since lmfusion runs no code of a model "
                "folder; remove auto_map if one of transformers' own classes reads these files"
            )


def with_tokenizer_check(read: Callable[[], Any], vocab_size: int, where: str) -> Callable[[], Any]:
    """A reader like `read`, which returns a tokenizer or None, that also calls `check_tokenizer`."""

    def read_and_check() -> Any:
        tokenizer = read()
        if tokenizer is not None:
            check_tokenizer(tokenizer, vocab_size, where)
        return tokenizer

    return read_and_check


def check_tokenizer(tokenizer: Any, vocab_size: int, where: str) -> None:
    """Raise ValueError for a tokenizer with a token that has no row in an embedding of `vocab_size` rows.

    BOI and EOI take the two ids after the vocabulary, so a token with such an id would be mistaken for one of them.
    where: the checkpoint.
    """
    ids = tokenizer.get_vocab()
    if not set(ids.values()) - set(tokenizer.added_tokens_decoder):
        raise ValueError(f"the tokenizer of {where} has an empty vocabulary; copy it again from the model's source")
    token, largest = max(ids.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer of {where} has {len(ids)} tokens with ids up to {largest} ({token!r:.80}), but the "
            f"embedding has {vocab_size} rows, for ids up to {vocab_size - 1}; resize the embedding with transformers' "
            f"resize_token_embeddings({largest + 1}) and save model and tokenizer together, or take the added tokens "
            "out of the tokenizer"
        )


def _read_settings(path: Path) -> dict[str, Any]:
    """The object in `path`; an empty one if the file is missing or damaged, which transformers reports."""
    try:
        return read_json_object(path, strict=False)
    except (OSError, ValueError):
        return {}


def _names_code(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("auto_map")) or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))
