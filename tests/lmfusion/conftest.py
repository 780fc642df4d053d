"""Fixtures: a random Llama, small enough for tests of the whole chain in seconds."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.harness.tiny_model import build_tokenizer, save_llama

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama in Hugging Face's form: 2 layers, width 32, 4 heads of 8, 2 key-value heads."""
    return save_llama(tmp_path_factory.mktemp("tiny_llama"), build_tokenizer())
