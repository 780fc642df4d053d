"""Downloads base models from the Hugging Face hub: only the files that are read."""

import glob
from pathlib import Path

from huggingface_hub import snapshot_download

from lmfusion.conversion.huggingface import CONFIG_NAME, GENERATION_NAME, INDEX_NAME, SINGLE_NAME, shard_names
from lmfusion.conversion.tokenizer import PROCESSOR_FILES, TOKENIZER_SETTINGS_FILES, VOCABULARY_FILES

SMALL_FILES = (
    CONFIG_NAME,
    GENERATION_NAME,
    INDEX_NAME,
    *VOCABULARY_FILES,
    *TOKENIZER_SETTINGS_FILES,
    "additional_chat_templates/*.jinja",
    "chat_template.json",
    *PROCESSOR_FILES,
)
"""Configurations, tokenizer and image processor."""


def download(name: str) -> Path:
    """The cache folder of the base that the hub calls `name`, downloaded if it is not there yet.

    The weights are model.safetensors, or else the shards that its index lists. Raises FileNotFoundError where the hub
    has no such model, and ValueError for a damaged index.
    """
    folder = _fetch(name, [*SMALL_FILES, SINGLE_NAME])
    if not (folder / SINGLE_NAME).is_file() and (folder / INDEX_NAME).is_file():
        shards = [glob.escape(shard) for shard in shard_names(folder / INDEX_NAME)]
        folder = _fetch(name, shards, folder.name)  # the folder is named after the commit
    return folder


def _fetch(name: str, files: list[str], revision: str | None = None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # of many kinds: malformed name, no network, no such repository, no access
        raise FileNotFoundError(
            f"no base model at {name!r}: there is no such folder or file here, and the Hugging Face hub gave none "
            f"({type(error).__name__}); give the path of a folder with config.json and safetensors, or of a .gguf file"
        ) from error
