"""A sparse pattern of activation over the pool, and how much two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ActivationPattern(NamedTuple):
    """Which neurons are active in each sample, and how strongly.

    idx: (B, K) int64, 0 <= idx < N, the active neurons in ascending order, then padding (0).
    gate: (B, K) float in [0, 1], dimensionless; 0 in padding slots.
    count: (B,) int64, active neurons of each sample: the first count[b] slots are in use, the rest are padding.
    n_neurons: N.
    """

    idx: Tensor
    gate: Tensor
    count: Tensor
    n_neurons: int

    def valid(self) -> Tensor:
        """(B, K) bool: which slots are in use."""
        return torch.arange(self.idx.shape[1], device=self.idx.device) < self.count[:, None]

    def to_dense(self) -> Tensor:
        """(B, N): the gate of every neuron, 0 where silent. Gradients: gate. Deterministic: only zeros add up."""
        return self.gate.new_zeros(self.idx.shape[0], self.n_neurons).scatter_add(1, self.idx, self.gate)


def _find(old: ActivationPattern, new: ActivationPattern) -> tuple[Tensor, Tensor]:
    """For each slot of new: (slot of old that holds the same neuron, whether there is one)."""
    if old.n_neurons != new.n_neurons or old.idx.shape[0] != new.idx.shape[0]:
        raise ValueError(
            f"old and new must share batch and pool, got B={old.idx.shape[0]}, N={old.n_neurons} "
            f"and B={new.idx.shape[0]}, N={new.n_neurons}"
        )
    keys = torch.where(old.valid(), old.idx, old.n_neurons)  # ascending: padding comes last
    slot = torch.searchsorted(keys, new.idx).clamp(max=keys.shape[1] - 1)
    return slot, (keys.gather(1, slot) == new.idx) & new.valid()


def jaccard(old: ActivationPattern, new: ActivationPattern) -> Tensor:
    """(B,) overlap of the active sets: |old and new| / |old or new|, 1 when the same neurons are active.

    Args: two patterns over the same batch and pool. Raises: ValueError if they are not.
    Gradients: none. Determinism: exact. Source: Jaccard 1912.
    """
    shared = _find(old, new)[1].sum(1)
    return shared / (old.count + new.count - shared)


def gate_change(old: ActivationPattern, new: ActivationPattern) -> Tensor:
    """(B,) mean of |gate_new - gate_old| over the neurons active in either; a silent neuron's gate is 0.

    Args: two patterns over the same batch and pool. Raises: ValueError if they are not.
    Gradients: the gates of both, so that it may serve as a settling loss. Determinism: bitwise.
    """
    slot, found = _find(old, new)
    before = torch.where(found, old.gate.gather(1, slot), 0)
    left = old.gate.sum(1) - before.sum(1)  # gates are >= 0: what went silent changed by its whole gate
    union = old.count + new.count - found.sum(1)
    return ((new.gate - before).abs().sum(1) + left) / union


def silent_neurons(patterns: ActivationPattern | Sequence[ActivationPattern], group_size: int = 1) -> Tensor:
    """(N,) bool: the neurons that are active in no sample of these patterns.

    Args: patterns, one or several over the same pool, such as the histories of many batches; group_size, divides N:
        only neurons of groups of so many that are silent as a whole, which a block-sparse pool can do without.
    Raises: ValueError. Gradients: none. Determinism: exact.
    """
    patterns = [patterns] if isinstance(patterns, ActivationPattern) else patterns
    pools = {p.n_neurons for p in patterns}
    if len(pools) != 1:
        raise ValueError(f"patterns must be over one pool, got n_neurons of {sorted(pools)}")
    n = pools.pop()
    if group_size < 1 or n % group_size:
        raise ValueError(f"group_size must divide n_neurons={n}, got {group_size}")
    silent = torch.ones(n + 1, dtype=torch.bool, device=patterns[0].idx.device)
    for pattern in patterns:  # padding marks the place after the last neuron
        silent[torch.where(pattern.valid(), pattern.idx, n)] = False
    return silent[:-1].view(-1, group_size).all(1).repeat_interleave(group_size)
