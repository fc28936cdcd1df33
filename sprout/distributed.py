"""What several processes see, joined, so that a rule without gradients has the same effect on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .pattern import ActivationPattern

# A string, as builds of torch without distributed have no ProcessGroup.
Group: TypeAlias = "dist.ProcessGroup | Literal['local'] | None"


def joint_group(process_group: Group) -> dist.ProcessGroup | None:
    """The group of processes to work with, or None if this one works alone.

    Args: process_group, a group; None for all processes, of which there is one where torch.distributed is not
        initialised; "local" for this process alone.
    Raises: TypeError for anything else; ValueError for a group that this process is not in.
    """
    if process_group is None:
        process_group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else "local"
    if process_group == "local":
        return None
    outside = process_group is dist.GroupMember.NON_GROUP_MEMBER  # what new_group gives to processes that it leaves out
    if not outside and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup, None or 'local', got {process_group!r}")
    if outside or dist.get_rank(process_group) < 0:
        raise ValueError("process_group must contain this process, got a group of others")
    return process_group if dist.get_world_size(process_group) > 1 else None


def gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """x of every process, in order of rank; of the same shape, dtype and kind of device on all of them."""
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x.contiguous(), group=group)
    return found


def join_patterns(
    history: Sequence[ActivationPattern], n_neurons: int, device: torch.device, group: dist.ProcessGroup
) -> list[ActivationPattern]:
    """The patterns of all processes as those of one batch, samples in order of rank; every process of group calls it.

    Args:
        history: L patterns (B, K) of this process's batch. B may differ between processes and be 0; a process without
            samples may also pass []. K is padded to the largest.
        n_neurons, device: N, and where the patterns and the result are.
    Returns: L patterns (sum of B, largest K), the same bits on every process; gates in float32 (or float64, if one is).
    Raises: ValueError, on all processes at once, if a history does not fit: of another pool, of patterns of different
        batches, of another length than elsewhere, or empty everywhere.
    Cost: one exchange of four numbers, which the host waits for, and one of L * B * (8 K + 4) bytes from each process.
    Gradients: none.
    """
    problem = _problem(history, n_neurons)
    batch = history[0].idx.shape[0] if history else 0
    slots = max((pattern.idx.shape[1] for pattern in history), default=0)
    double = any(pattern.gate.dtype == torch.float64 for pattern in history)
    facts = [-1 if problem else len(history), batch, slots, int(double)]
    told = [found.tolist() for found in gather(torch.tensor(facts, device=device), group)]
    if problem:
        raise ValueError(problem)
    length = _common_length(told)
    batches, slots = [b for _, b, _, _ in told], max(k for _, _, k, _ in told)
    dtype = torch.float64 if any(wide for _, _, _, wide in told) else torch.float32
    sent = _packed(history, (length, max(batches), slots), dtype, device)
    joined = torch.cat([part[:, :b] for part, b in zip(gather(sent, group), batches, strict=True)], 1)
    count, idx = joined[:, :, 0].long(), joined[:, :, 1 : 1 + slots].long()
    gate = joined[:, :, 1 + slots :].clone(memory_format=torch.contiguous_format).view(dtype)
    return [ActivationPattern(idx[step], gate[step], count[step], n_neurons) for step in range(length)]


def _problem(history: Sequence[ActivationPattern], n_neurons: int) -> str | None:
    for other in {pattern.n_neurons for pattern in history} - {n_neurons}:
        return f"pattern must be over n_neurons={n_neurons} neurons, got {other}"
    batches = sorted({pattern.idx.shape[0] for pattern in history})
    return f"pattern must hold patterns of one batch, got B in {batches}" if len(batches) > 1 else None


def _common_length(told: list[list[int]]) -> int:
    """L of all histories that are not empty. Raises: ValueError if there is none, or none in common."""
    for rank, facts in enumerate(told):
        if facts[0] < 0:
            raise ValueError(f"pattern of process {rank} of the group does not fit; see the error there")
    lengths = sorted({length for length, *_ in told} - {0})
    if not lengths:
        raise ValueError("pattern must hold at least one ActivationPattern, got an empty history on every process")
    if len(lengths) > 1:
        raise ValueError(f"pattern must be a history of the same length on every process, got lengths {lengths}")
    return lengths[0]


def _packed(
    history: Sequence[ActivationPattern], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(L, largest B, 1 + K + K * dtype.itemsize / 4) int32: count, idx and the bits of gate, zeros where is nothing."""
    length, batch, slots = shape
    packed = torch.zeros(length, batch, 1 + slots + slots * dtype.itemsize // 4, dtype=torch.int32, device=device)
    for row, (idx, gate, count, _) in zip(packed, history, strict=False):  # an empty history leaves its rows empty
        b, k = idx.shape
        bits = gate.detach().to(dtype).clone(memory_format=torch.contiguous_format).view(torch.int32)
        row[:b, 0], row[:b, 1 : 1 + k], row[:b, 1 + slots : 1 + slots + bits.shape[1]] = count, idx, bits
    return packed
