"""Structural plasticity of a pool: its stored blocks follow which neurons are active together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from bio_kernels import BlockSparse, Rewiring, co_activity, rewire_, rewire_optimizer_
from torch.optim import Optimizer

from .distributed import Group, join_patterns, joint_group
from .pattern import ActivationPattern
from .sharded_pool import refuse_shards

if TYPE_CHECKING:
    from .model import BrainLikeSprout


@torch.no_grad()
def rewire(
    model: BrainLikeSprout,
    pattern: ActivationPattern | Sequence[ActivationPattern],
    *,
    max_new_per_row: int = 1,
    margin: float = 0.1,
    optimizers: Sequence[Optimizer] = (),
    process_group: Group = None,
) -> Rewiring:
    """Gives the places of the least used stored blocks, in place, to those that these patterns want most.

    Args: pattern, one or several, the more the better: a block none of whose neurons are active together in them is of
        no use; max_new_per_row, margin, as in ``bio_kernels.rewire_``; optimizers, whose states of the blocks are moved
        along (those that do not hold them are left alone); process_group, whose samples count, as in
        ``BrainLikeSprout.plasticity``: every process of it calls this, and ends with the same layout.
    Returns: what became of the blocks. Raises: ValueError for a dense pool, no pattern, a pattern of another pool or an
        optimizer that ``rewire_optimizer_`` refuses; nothing was changed then. Gradients: none. Determinism: bitwise.
    """
    refuse_shards(model, "rewire")
    strength = model.pool.connection_strength
    if not isinstance(strength, BlockSparse):
        raise ValueError("connection must be 'block_sparse' to be rewired, got 'dense': all blocks are stored")
    history = [pattern] if isinstance(pattern, ActivationPattern) else list(pattern)
    group = joint_group(process_group)
    if group is not None:
        history = join_patterns(history, model.config.n_neurons, strength.blocks.device, group)
    if not history:
        raise ValueError("pattern must hold at least one ActivationPattern, got none")
    for other in {p.n_neurons for p in history} - {model.config.n_neurons}:
        raise ValueError(f"pattern must be over n_neurons={model.config.n_neurons} neurons, got {other}")
    holders = [x for x in optimizers if any(strength.blocks is p for group in x.param_groups for p in group["params"])]
    same = torch.arange(len(strength.blocks), device=strength.blocks.device)
    for optimizer in holders:  # moves nothing, and refuses what would be refused
        rewire_optimizer_(optimizer, strength.blocks, Rewiring(same, torch.zeros_like(same, dtype=torch.bool)))

    found = [co_activity(idx, gate, count, n, strength.block_size) for idx, gate, count, n in history]
    rows, cols, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    rewiring = rewire_(strength, (rows, cols, value), max_new_per_row=max_new_per_row, margin=margin)
    for optimizer in holders:
        rewire_optimizer_(optimizer, strength.blocks, rewiring)
    return rewiring
