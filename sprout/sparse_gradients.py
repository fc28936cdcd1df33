"""Training a pool in groups: which gradients are sparse, and what torch has no form of for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .model import BrainLikeSprout

TABLES = {"neuron_signatures", "threshold", "connection_strength", "readout"}  # they have a row for each neuron


def sparse_tables(model: nn.Module) -> set[str]:
    """Names of the parameters whose gradients are sparse: the big tables of a SPROUT with active_groups, else none."""
    if not isinstance(model, BrainLikeSprout) or not model.config.active_groups:
        return set()
    return {name for name, _ in model.named_parameters() if TABLES & set(name.split("."))}


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for gradients of which some are sparse; returns the norm before.

    In place, of strided gradients and of the values of sparse ones, which are coalesced first: of rows that repeat the
    norm is that of their sum. Args: max_norm > 0, may be infinite.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in values]))
    torch._foreach_mul_(values, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
