"""Sparse neuron interaction for PyTorch: a large pool of neurons of which few are active."""

from ._backend import backend_info
from .block_sparse import BlockSparse
from .ops import TopKGather, shared_table, sparse_attention, topk_gather, update_strength_, weighted_rows

__version__ = "0.1.0"

__all__ = [
    "BlockSparse",
    "TopKGather",
    "backend_info",
    "shared_table",
    "sparse_attention",
    "topk_gather",
    "update_strength_",
    "weighted_rows",
]
