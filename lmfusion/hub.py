"""Registers lmfusion's models with transformers: import this module before AutoConfig or AutoModel read one."""

import lmfusion.model.modeling  # noqa: F401 (registers when it is imported)
