"""Torch ops for transformers with two towers, one for text and one for images, that share their attention.

`TokenLayout` says which token goes to which tower and what it sees; the ops take rows in tower order. `reference` is
the specification in plain PyTorch, `backends()` reports what runs here.
"""

from lmfusion_kernels import reference
from lmfusion_kernels.block.modules import RoutedBlock, TowerLayer
from lmfusion_kernels.block.routed_block import routed_block
from lmfusion_kernels.block.weights import BlockWeights, RopeTables, rope_tables
from lmfusion_kernels.layout.packing import pack_documents
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.ops.hybrid_attention import hybrid_attention
from lmfusion_kernels.ops.linear import routed_linear
from lmfusion_kernels.ops.rms_norm import routed_rms_norm
from lmfusion_kernels.ops.rope_reorder import rope_reorder
from lmfusion_kernels.ops.swiglu import routed_swiglu
from lmfusion_kernels.runtime.report import backends

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
