"""Structural plasticity: which blocks of a BlockSparse are stored follows which neurons are active together.

A block-sparse matrix has a fixed budget of blocks. ``co_activity`` counts what each block would be good for, whether it
is stored or not; ``rewire_`` gives the places of the least used blocks to the most wanted ones, in place;
``rewire_optimizer_`` takes an optimizer's state along. The cost follows the active blocks and the stored ones, Z, never
N * N. Plain torch, on any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from .block_sparse import BlockSparse, _block_rows, _keys, _rows
from .reference import add_

_PAIRS = 2**22  # pairs of active blocks that are held at a time: about 100 MB


class CoActivity(NamedTuple):
    """How much pairs of blocks were active together; absent pairs: never.

    rows, cols: (E,) int64, block of the senders and of the receivers, in ascending order of (row, column), no repeats.
    value: (E,) float64, see ``co_activity``.
    """

    rows: Tensor
    cols: Tensor
    value: Tensor


class Rewiring(NamedTuple):
    """Where the blocks of a new layout come from.

    source: (Z,) int64, a permutation: the slot of the old layout whose place (and, unless it is fresh, whose values)
        each slot of the new one has; within a block row always.
    fresh: (Z,) bool, the block is new and starts at zero; source names the block that was dropped for it.
    """

    source: Tensor
    fresh: Tensor


@torch.no_grad()
def co_activity(idx: Tensor, gate: Tensor, count: Tensor | None, n: int, block_size: int) -> CoActivity:
    """How much the neurons of each two blocks were active together: the Hebbian term, summed over a block.

    value[r, c] = sum_b mass_b[r] mass_b[c];  mass_b[r] = sum of the gates of the active neurons of b in block r

    which is the sum over the synapses of block (r, c), and over the samples, of gate_pre * gate_post; also for r = c.

    Args:
        idx: (B, K) int32 or int64 in 0..N-1, the active neurons, none twice in a sample.
        gate: (B, K) float, how active they are.
        count: (B,) int32 or int64 in 0..K: only the first count[b] slots are read. None for all.
        n: N, number of neurons. block_size: P in {16, 32, 64, 128}, divides N.

    Returns:
        CoActivity of the pairs of blocks that were active in one sample. To gather it over batches, concatenate what
        each batch gives: ``rewire_`` adds repeats.

    Raises: TypeError, ValueError: an argument is not as above; the message names it (values are checked on a CPU).
    Cost: the sum over the samples of A * A, A the active blocks of a sample; memory for 4 million pairs at a time.
    Gradients: none. Determinism: the same bits every time on a device.
    Source: Hebb (1949).
    """
    rows = _block_rows(n, block_size)
    _checks.slots(idx, count, n)
    _checks.tensor("gate", gate, "(B, K)", (2,))
    _checks.size("gate", gate, "(B, K) as idx", tuple(idx.shape))
    _checks.same_device(idx=idx, gate=gate, count=count)
    _checks.indices(idx, n, count, distinct=True)
    used = (idx >= 0) & (idx < n)
    if count is not None:
        used &= torch.arange(idx.shape[1], device=idx.device) < count[:, None]
    sample, slot = used.nonzero(as_tuple=True)
    active, mass = _sum_repeats(sample * rows + idx[sample, slot].long() // block_size, gate[sample, slot])
    sample, block = active // rows, active % rows  # (A of all samples,), ascending
    blocks = torch.bincount(sample, minlength=idx.shape[0])
    found = CoActivity(block[:0], block[:0], mass[:0])
    for first, last in _chunks(blocks.square().cumsum(0).tolist()):
        start, end = (int(blocks[:b].sum()) for b in (first, last))
        more = _pairs(block[start:end], mass[start:end], blocks[first:last])
        row, col, value = (torch.cat(both) for both in zip(found, more, strict=True))
        found = _coalesced(row, col, value, rows)
    return found


def _sum_repeats(keys: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct keys, ascending, and the sum of the values of each in float64, added in the order given."""
    keys, order = keys.sort(stable=True)
    keys, place = keys.unique_consecutive(return_inverse=True)
    total = torch.zeros(keys.shape, dtype=torch.float64, device=keys.device)
    add_(total, place, value.double()[order])
    return keys, total


def _coalesced(rows: Tensor, cols: Tensor, value: Tensor, total: int) -> CoActivity:
    keys, value = _sum_repeats(rows.long() * total + cols, value)
    return CoActivity(keys // total, keys % total, value)


def _chunks(pairs: list[int]) -> list[tuple[int, int]]:
    """Runs of samples first..last-1 of at most _PAIRS pairs, or of one sample; pairs: their running total."""
    runs, first, done = [], 0, 0
    for sample, total in enumerate(pairs):
        if sample > first and total - done > _PAIRS:
            runs.append((first, sample))
            first, done = sample, pairs[sample - 1]
    return [*runs, (first, len(pairs))] if pairs else []


def _pairs(block: Tensor, mass: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All ordered pairs of the active blocks of each sample, which are blocks[b] entries in a row."""
    others = blocks.repeat_interleave(blocks)  # for each entry: active blocks of its sample
    start = (blocks.cumsum(0) - blocks).repeat_interleave(blocks)  # ... and the first of them
    one = torch.arange(len(block), device=block.device).repeat_interleave(others)
    within = torch.arange(len(one), device=block.device) - (others.cumsum(0) - others)[one]
    other = start[one] + within
    return block[one], block[other], mass[one] * mass[other]


@torch.no_grad()
def rewire_(
    matrix: BlockSparse, wanted: tuple[Tensor, Tensor, Tensor], *, max_new_per_row: int, margin: float = 0.1
) -> Rewiring:
    """Replace, in place, the least used stored blocks of every block row by the most wanted ones that are not stored.

    use[r, c]  = wanted[r, c] * max(1, norm of block (r, c) / mean norm of the stored blocks)
    Of a block row, the block of least use gives way to the most wanted absent one if wanted > (1 + margin) * use, then
    the next of both, and so on, at most max_new_per_row times.

    A block counts by how much its neurons are active together, and more if its synapses have grown stronger than
    most; a weak one is not marked down for it, since it may be new. Nothing else would let a block that starts at zero
    stay. A block whose neurons were never active together is of no use, so let ``wanted`` cover many batches.

    Args:
        matrix: its ``blocks`` and ``cols`` change in place; the budget (Z, row_offsets) and the Parameter stay. A
            gradient it holds is moved along.
        wanted: rows (E,) and cols (E,) int32 or int64 in 0..N/P-1, value (E,) float, finite and >= 0: what
            ``co_activity`` returns, or several of them concatenated: repeats add. Absent pairs are 0.
        max_new_per_row: >= 0, how many blocks of a block row may be replaced.
        margin: finite and >= 0, dimensionless: how much more than a stored block a new one has to be wanted.

    Returns:
        Rewiring: what became of the slots, for whatever else is kept per block (see ``rewire_optimizer_``).

    Raises: TypeError, ValueError: an argument is not as above; the message names it, and nothing was changed.
    What it changes: new blocks are zero, so that only the contribution of the dropped ones goes from the outputs.
        Repeated with the same ``wanted`` it changes nothing, unless max_new_per_row had held it back.
    Gradients: none. Determinism: the same bits every time; ties go to the lowest column.
    Source: drop and regrow at a fixed budget, Mocanu et al. (2018); new connections at zero where a statistic of
        recent batches is largest, Evci et al. (2020); here that statistic is Hebb's, as in Butz et al. (2009).
    """
    _checks.integer("max_new_per_row", max_new_per_row, 0, 2**31, "2**31")
    margin = _checks.number("margin", margin, low=0.0)
    if not isinstance(matrix, BlockSparse):
        raise TypeError(f"matrix must be a BlockSparse, got {type(matrix).__name__}")
    offsets, cols = matrix.row_offsets, matrix.cols
    total = offsets.numel() - 1
    wanted = _wanted(wanted, matrix)
    keys, stored = wanted.rows * total + wanted.cols, _keys(offsets, cols)
    use = _at(stored, keys, wanted.value, 0.0) * _strength(matrix.blocks)
    absent = (_at(keys, stored, torch.ones_like(use), 0.0) == 0).nonzero().squeeze(1)

    row, length = _rows(offsets), offsets.diff().long()
    weakest = _by_row(use.sort(stable=True).indices, row)  # the slots of each block row, least used first
    best = absent[_by_row(wanted.value[absent].sort(descending=True, stable=True).indices, wanted.rows[absent])]
    new_row, new_col = wanted.rows[best], wanted.cols[best]
    rank = torch.arange(len(best), device=cols.device) - torch.searchsorted(new_row, new_row)
    fits = rank < length[new_row].clamp(max=max_new_per_row)
    best, new_col, rank, new_row = (x[fits] for x in (best, new_col, rank, new_row))
    slot = weakest[offsets[new_row] + rank]
    taken = wanted.value[best] > (1 + margin) * use[slot]

    fresh, col = torch.zeros_like(row, dtype=torch.bool), cols.to(torch.int64, copy=True)
    fresh[slot[taken]] = True
    col[slot[taken]] = new_col[taken]
    source = (row * total + col).argsort()
    rewiring = Rewiring(source, fresh[source])
    cols.copy_(col[source])
    _move_(matrix.blocks, rewiring)
    grad = matrix.blocks.grad
    if grad is not None and grad.is_sparse:
        matrix.blocks.grad = _moved(grad, rewiring)
    elif grad is not None:
        _move_(grad, rewiring)
    return rewiring


def _wanted(wanted: tuple[Tensor, Tensor, Tensor], matrix: BlockSparse) -> CoActivity:
    """Checked, repeats added."""
    rows, cols, value = wanted
    total = matrix.row_offsets.numel() - 1
    _checks.tensor("wanted.value", value, "(E,)", (1,))
    for name, x in (("rows", rows), ("cols", cols)):
        _checks.tensor(f"wanted.{name}", x, "(E,)", (1,), _checks.INDICES)
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < total:
            raise ValueError(f"wanted.{name} must be in 0..{total - 1}, got {int(x.min())}..{int(x.max())}")
        _checks.size(f"wanted.{name}", x, "(E,) as wanted.value", tuple(value.shape))
    _checks.same_device(matrix=matrix, rows=rows, cols=cols, value=value)
    if not bool((value.isfinite() & (value >= 0)).all()):
        raise ValueError("wanted.value must be finite and >= 0")
    return _coalesced(rows, cols, value, total)


def _strength(blocks: Tensor) -> Tensor:
    """(Z,) float64: norm of each block over their mean, at least 1.

    The mean of the sorted norms does not rise, not even by rounding, when some become zero: so ``rewire_`` cannot
    lower the use of a block that stays, and stops where it stands.
    """
    norm = torch.linalg.vector_norm(blocks.flatten(1), dim=1, dtype=torch.promote_types(blocks.dtype, torch.float32))
    norm = norm.double()
    mean = norm.sort().values.mean()
    return torch.where(mean > 0, norm / mean, 1.0).clamp(min=1)


def _at(keys: Tensor, known: Tensor, value: Tensor, default: float) -> Tensor:
    """The value of each key among the known ones, which ascend; default for the others."""
    if not known.numel():
        return torch.full(keys.shape, default, dtype=value.dtype, device=keys.device)
    place = torch.searchsorted(known, keys).clamp(max=known.numel() - 1)
    return torch.where(known[place] == keys, value[place], default)


def _by_row(order: Tensor, row: Tensor) -> Tensor:
    """Positions in the order given, within each row; rows ascend."""
    return order[row[order].sort(stable=True).indices]


def _move_(values: Tensor, rewiring: Rewiring) -> None:
    """Puts (Z, P, P) values where the new layout has them, zeros for fresh blocks; copies a P-th of them at a time."""
    changed = rewiring.fresh | (rewiring.source != torch.arange(len(values), device=values.device))
    slot = changed.nonzero().squeeze(1)
    source, fresh = rewiring.source[slot], rewiring.fresh[slot, None]
    for line in values.unbind(1):
        line[slot] = line[source].masked_fill_(fresh, 0)


def _moved(grad: Tensor, rewiring: Rewiring) -> Tensor:
    """A sparse gradient of blocks (Z, P, P) by slot in the new layout, without that of blocks that are gone."""
    grad = grad.coalesce()
    slot = torch.empty_like(rewiring.source)
    slot[rewiring.source] = torch.arange(len(slot), device=slot.device)
    slot = slot[grad.indices()[0]]
    kept = ~rewiring.fresh[slot]
    return torch.sparse_coo_tensor(slot[kept][None], grad.values()[kept], grad.shape, check_invariants=False)


@torch.no_grad()
def rewire_optimizer_(optimizer: torch.optim.Optimizer, parameter: Tensor, rewiring: Rewiring) -> None:
    """Move, in place, what an optimizer remembers of the blocks of a matrix to where ``rewire_`` has put them.

    Every state tensor of the parameter's shape is permuted as the blocks were, with zeros for fresh blocks: momentum of
    SGD, both moments of Adam, AdamW and SparseAdam. Scalars, as the step, stay.

    Args: optimizer, any; parameter, the ``blocks`` of the matrix; rewiring, what ``rewire_`` returned.
    Raises: ValueError if the optimizer does not hold the parameter, or remembers something per row or column of it,
        as Adafactor does; nothing was changed then.
    Determinism: exact.
    """
    if not any(parameter is p for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"parameter must be one of the optimizer's, got a tensor of shape {tuple(parameter.shape)}")
    state = optimizer.state.get(parameter, {})
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor) and x.dim()}
    for name, x in tensors.items():
        if x.shape != parameter.shape:
            raise ValueError(f"optimizer state {name!r} must have the parameter's shape, got {tuple(x.shape)}")
    for x in tensors.values():
        _move_(x, rewiring)
