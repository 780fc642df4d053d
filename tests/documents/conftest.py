"""The tiny model of the package's tests, for documents whose examples run."""

from tests.lmfusion.conftest import tiny_llama as tiny_llama
from tests.lmfusion.conftest import tokenizer as tokenizer
