"""Training a pool in groups: which gradients are sparse, and what torch has no form of for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .distributed import gather
from .model import BrainLikeSprout
from .sharded import ShardedTable

TABLES = {"neuron_signatures", "threshold", "connection_strength", "readout"}  # they have a row for each neuron


def sparse_tables(model: nn.Module) -> set[str]:
    """Names of the parameters whose gradients are sparse: the big tables of a SPROUT with active_groups, else none."""
    if not isinstance(model, BrainLikeSprout) or not model.config.active_groups:
        return set()
    return {name for name, _ in model.named_parameters() if TABLES & set(name.split("."))}


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, *, tables: Sequence[ShardedTable] = ()) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for gradients of which some are sparse; returns the norm before.

    In place, of strided gradients and of the values of sparse ones, which are coalesced first: of rows that repeat the
    norm is that of their sum. Args: max_norm > 0, may be infinite; tables, those among the parameters that are spread
    over processes: the norm is that of all rows, to the bit the same on every process, and all processes call this.
    """
    values, norms, spread = [], [], []
    rows = {id(table.local) for table in tables}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        values.append(parameter.grad.values() if parameter.grad.is_sparse else parameter.grad)
        (spread if id(parameter) in rows else norms).append(torch.linalg.vector_norm(values[-1]))
    if tables:
        own = torch.linalg.vector_norm(torch.stack(spread or [torch.zeros_like(norms[0])]))
        norms += gather(own, tables[0].group) if tables[0].group is not None else [own]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch._foreach_mul_(values, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
