"""Torch ops for transformers with two towers, one for text and one for images, that share their attention.

`TokenLayout` says which row goes to which tower and what it sees; the ops take rows in tower order. `reference` is the
specification in plain PyTorch, `backends()` tells what runs here.
"""

from lmfusion_kernels import reference
from lmfusion_kernels.backends import backends
from lmfusion_kernels.block import routed_block
from lmfusion_kernels.hybrid_attention import hybrid_attention
from lmfusion_kernels.layout import TokenLayout
from lmfusion_kernels.linear import routed_linear
from lmfusion_kernels.module import RoutedBlock, TowerLayer
from lmfusion_kernels.packing import pack_documents
from lmfusion_kernels.rms_norm import routed_rms_norm
from lmfusion_kernels.rope_reorder import rope_reorder
from lmfusion_kernels.swiglu import routed_swiglu
from lmfusion_kernels.weights import BlockWeights, RopeTables, rope_tables

__all__ = [
    "BlockWeights",
    "RopeTables",
    "RoutedBlock",
    "TokenLayout",
    "TowerLayer",
    "backends",
    "hybrid_attention",
    "pack_documents",
    "reference",
    "rope_reorder",
    "rope_tables",
    "routed_block",
    "routed_linear",
    "routed_rms_norm",
    "routed_swiglu",
]
