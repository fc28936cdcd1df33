"""A pool of any size at the cost of its active part: groups of neurons are chosen first, and only those are looked at.

Neurons live in groups of P = block_size consecutive ones. A group has a signature and a threshold of its own, which
are added to those of its members; each sample chooses the active_groups groups that match its z best. What a batch
chose is paged in: signatures, thresholds and stored connections of the groups U that any of its samples uses become a
small pool of |U| * P neurons, on which everything runs as on a whole one. A score of -inf keeps the neurons of other
samples' groups out, so that no sample depends on its batch. Pages lie in ascending order: so do their neurons.

The gradients of the pool's tables are sparse tensors of the rows that were paged in, for torch.optim.SparseAdam.
"""

from __future__ import annotations

from typing import NamedTuple

import bio_kernels
import torch
from bio_kernels import BlockSparse
from torch import Tensor
from torch.autograd import Function

from .config import SproutConfig
from .pattern import ActivationPattern
from .sharded import ShardedTable
from .sharded_pool import ShardedBlocks


class _SparseRows(Function):
    @staticmethod
    def forward(ctx, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = table.shape
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        indices = ctx.saved_tensors[0].unsqueeze(0)
        # Held here so that .grad becomes a copy of it: if nobody else held it, it would be taken apart and put together
        # again there, and no longer be known as coalesced. Copying costs less than sorting.
        ctx.out = torch.sparse_coo_tensor(
            indices, grad.contiguous(), ctx.shape, check_invariants=False, is_coalesced=True
        )
        return ctx.out, None


def sparse_rows(table: Tensor | ShardedTable, rows: Tensor) -> Tensor:
    """table[rows], whose gradient is a coalesced torch.sparse_coo tensor of those rows.

    Args: table (N, ...), a leaf, or one that is spread over processes; rows (R,) int64 in 0..N-1, ascending, none twice
        (not checked in a leaf).
    Returns: (R, ...). Gradients: table, of a spread one those of the processes' mean loss. Determinism: exact.
    """
    if isinstance(table, ShardedTable):
        return table.rows(rows, mean=True)
    return _SparseRows.apply(table, rows)  # type: ignore[return-value]


class GroupedScore(NamedTuple):
    """How well the input matches a pool in groups, before anything is chosen.

    group: (B, G), of all G groups. groups: (U,) int64 ascending, those paged in. member: (B, U * P), of their neurons.
    """

    group: Tensor
    groups: Tensor
    member: Tensor


class Page(NamedTuple):
    """The part of a pool that a batch uses, as a pool of n = |U| * P neurons of its own.

    groups: (U,) int64, its groups in ascending order: neuron i of the page is groups[i // P] * P + i % P of the pool.
    n_neurons: N, of the pool.
    signatures: (n, D), the groups' included. strength: BlockSparse (n, n), the stored blocks between its groups.
    score: (B, n), -inf for the neurons of groups that a sample did not choose.
    scores: what it was chosen by.
    """

    groups: Tensor
    n_neurons: int
    signatures: Tensor
    strength: BlockSparse
    score: Tensor
    scores: GroupedScore

    def localise(self, pattern: ActivationPattern) -> ActivationPattern:
        """A pattern over the pool, of neurons that are paged in, as one over the page."""
        return pattern._replace(
            idx=torch.where(pattern.valid(), page_index(pattern.idx, self.groups, self.strength.block_size), 0),
            n_neurons=len(self.signatures),
        )

    def globalise(self, pattern: ActivationPattern) -> ActivationPattern:
        """A pattern over the page as one over the pool; the inverse of ``localise``."""
        p = self.strength.block_size
        idx = self.groups[pattern.idx // p] * p + pattern.idx % p
        return pattern._replace(idx=torch.where(pattern.valid(), idx, 0), n_neurons=self.n_neurons)


def page_index(idx: Tensor, groups: Tensor, block_size: int) -> Tensor:
    """Where neurons idx of the pool are in a page of these groups; without meaning for those that are not in it."""
    place = torch.searchsorted(groups, idx // block_size).clamp(max=len(groups) - 1)
    return place * block_size + idx % block_size


def choose_groups(group_score: Tensor, config: SproutConfig) -> Tensor:
    """(B, active_groups) int64 ascending: the groups of each sample with the highest score (B, G); no gradient."""
    score = group_score.detach()
    nothing = score.new_zeros(score.shape[1], 1)
    return bio_kernels.topk_gather(score, nothing, config.active_groups, backend=config.backend).idx


def page_in(
    z: Tensor,
    group_score: Tensor,
    tables: tuple[Tensor | ShardedTable, Tensor | ShardedTable, Tensor, Tensor],
    strength: BlockSparse | ShardedBlocks,
    config: SproutConfig,
) -> Page:
    """What the samples of a batch need of the pool.

    Args: z (B, D); group_score (B, G); tables, the pool's neuron_signatures (N, D), threshold (N,), group_signatures
        (G, D) and group_threshold (G,); strength, (N, N). The first two and the blocks may be spread over processes.
    Gradients: z, the tables and strength.blocks; sparse for those with a row for each neuron, and for the blocks.
    Cost: of B * active_groups groups, and of sorting their numbers. Waits for the device once: for the sizes. Of a pool
        that is spread over W processes also of looking through N / P groups and Z / W blocks, and more waits.
    """
    signatures, threshold, group_signatures, group_threshold = tables
    p = strength.block_size
    own = choose_groups(group_score, config)
    groups, block, row_offsets, cols = _layout(own, strength)
    place = torch.searchsorted(groups, own)
    neuron = (groups[:, None] * p + torch.arange(p, device=z.device)).flatten()

    page_signatures = sparse_rows(signatures, neuron).unflatten(0, (-1, p)) + group_signatures[groups][:, None]
    page_signatures = page_signatures.flatten(0, 1)
    page_threshold = (sparse_rows(threshold, neuron).unflatten(0, (-1, p)) + group_threshold[groups][:, None]).flatten()
    member = torch.addmm(page_threshold, z * z.shape[1] ** -0.5, page_signatures.t())
    foreign = torch.ones(len(z), len(groups), dtype=torch.bool, device=z.device).scatter_(1, place, False)
    score = member.unflatten(1, (-1, p)).masked_fill(foreign[..., None], float("-inf")).flatten(1)

    sharded = isinstance(strength, ShardedBlocks)
    blocks = strength.part(groups, block) if sharded else sparse_rows(strength.blocks, block)
    part = BlockSparse.trusted(blocks, row_offsets, cols, strength.search_steps)
    scores = GroupedScore(group_score, groups, member)
    return Page(groups, config.n_neurons, page_signatures, part, score, scores)


def _layout(own: Tensor, strength: BlockSparse | ShardedBlocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The different groups among own (B, A), ascending, and the stored blocks between them: groups (U,), block (Z',)
    int64 numbers of the blocks, and their row_offsets (U + 1,) and cols (Z',) int32 in a matrix of these groups alone.

    Both sizes are fetched at once: on a GPU each would be a wait of its own.
    """
    found = own.flatten().sort().values  # with repeats
    fresh = torch.ones_like(found, dtype=torch.bool)
    fresh[1:] = found[1:] != found[:-1]
    first, end = strength.row_offsets[found].long(), strength.row_offsets[found + 1].long()
    block = first[:, None] + torch.arange(2**strength.search_steps - 1, device=own.device)
    col = strength.cols[block.clamp(max=len(strength.cols) - 1)].long()
    place = torch.searchsorted(found, col).clamp(max=len(found) - 1)
    kept = (block < end[:, None]) & fresh[:, None] & (found[place] == col)
    n_groups, n_blocks = torch.stack([fresh.sum(), kept.sum()]).tolist()

    at = torch.nonzero_static(fresh, size=n_groups).squeeze(1)
    row, slot = torch.nonzero_static(kept, size=n_blocks).unbind(1)
    number = fresh.cumsum(0) - 1  # of the group among the different ones
    offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept[at].sum(1).cumsum(0)])
    return found[at], block[row, slot], offsets.to(torch.int32), number[place[row, slot]].to(torch.int32)
