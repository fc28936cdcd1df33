"""Sparse neuron interaction for PyTorch: a large pool of neurons of which few are active."""

from ._backend import backend_info
from .block_sparse import BlockSparse
from .ops import TopKGather, shared_table, sparse_attention, topk_gather, update_strength_, weighted_rows
from .rewire import CoActivity, Rewiring, co_activity, rewire_, rewire_optimizer_

__version__ = "0.1.0"

__all__ = [
    "BlockSparse",
    "CoActivity",
    "Rewiring",
    "TopKGather",
    "backend_info",
    "co_activity",
    "rewire_",
    "rewire_optimizer_",
    "shared_table",
    "sparse_attention",
    "topk_gather",
    "update_strength_",
    "weighted_rows",
]
