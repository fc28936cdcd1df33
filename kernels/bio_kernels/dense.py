"""The dense N x N baselines: what one would write without sparsity, and the opponent of every benchmark.

Nothing here shares code with the reference, so that a mistake is not shared either. Silent neurons are zeros in
(B, N, ...) tensors, connections are a full matrix, and autograd derives the gradients. All four take float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_sparse import BlockSparse


def _matrix(strength: Tensor | BlockSparse) -> Tensor:
    return strength.to_dense() if isinstance(strength, BlockSparse) else strength


def _spread(values: Tensor, idx: Tensor, n: int) -> Tensor:
    """values (B, K) or (B, K, D) at idx (B, K) of a pool of n neurons, zeros elsewhere; repeats add."""
    batch, trailing = values.shape[0], values.shape[2:]
    index = idx.long().reshape(*idx.shape, *(1 for _ in trailing)).expand_as(values)
    return values.new_zeros(batch, n, *trailing).scatter_add(1, index, values)


def topk_gather(score: Tensor, table: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the whole row; see ``bio_kernels.topk_gather`` for shapes and meaning."""
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    idx = order[:, :k].sort(dim=1).values
    gate = score.gather(1, idx)
    pool = table if table.dim() == 3 else table.expand(score.shape[0], *table.shape)
    return gate, idx, pool.gather(1, idx[:, :, None].expand(-1, -1, table.shape[-1]))


def weighted_rows(table: Tensor | BlockSparse, idx: Tensor, weight: Tensor) -> Tensor:
    """One dense product of a (B, N) activation with the table; see ``bio_kernels.weighted_rows``."""
    table = _matrix(table)
    active = _spread(weight.to(table.dtype), idx, table.shape[-2])
    return torch.bmm(active[:, None], table)[:, 0] if table.dim() == 3 else active @ table


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    strength: Tensor | BlockSparse | None,
    gate: Tensor | None,
    count: Tensor | None,
    scale: float,
    n: int,
) -> Tensor:
    """Attention of all n neurons with all, masked, one sample at a time; see ``bio_kernels.sparse_attention``.

    Work and memory are H * N * N a sample. Scores are float32 (float64 for float64 inputs).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    bias = None if strength is None else _matrix(strength).to(wide).T
    slots = torch.full((q.shape[0],), q.shape[2], device=q.device) if count is None else count
    speak = torch.ones(idx.shape, device=q.device, dtype=wide) if gate is None else gate.to(wide)
    valid = torch.arange(q.shape[2], device=q.device) < slots[:, None]
    outs = []
    for b in range(q.shape[0]):
        where, used = idx[b].masked_fill(~valid[b], n).long(), valid[b][:, None]

        def everywhere(x: Tensor, where: Tensor = where, used: Tensor = used) -> Tensor:
            wanted = x.masked_fill(~used, 0).to(wide)
            return wanted.new_zeros(x.shape[0], n + 1, x.shape[2]).index_copy(1, where, wanted)[:, :n]

        gates = speak.new_zeros(n + 1).index_copy(0, where, speak[b].masked_fill(~valid[b], 0))[:n]
        active = torch.zeros(n + 1, dtype=torch.bool, device=q.device).index_fill(0, where, True)[:n]
        out = _masked_attention(everywhere(q[b]), everywhere(k[b]), everywhere(v[b]), bias, gates, active, scale)
        outs.append(out[:, where.clamp(max=n - 1)].masked_fill(~used, 0))
    return torch.stack(outs).to(v.dtype) if outs else torch.zeros_like(v)


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gate: Tensor, active: Tensor, scale: float
) -> Tensor:
    """(H, N, Dh) for one sample; only neurons that are active send, each with the weight of its gate."""
    score = q @ k.transpose(1, 2) * scale
    if bias is not None:
        score = score + bias
    score = score.masked_fill(~active, -torch.inf)
    top = score.detach().masked_fill(gate == 0, -torch.inf).amax(-1, keepdim=True)
    weight = gate * torch.exp(score - torch.where(top == -torch.inf, 0.0, top))
    total = weight.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, weight @ v / torch.where(total == 0, 1.0, total))


@torch.no_grad()
def update_strength(
    strength: Tensor | BlockSparse,
    idx: Tensor,
    pre: Tensor,
    post: Tensor,
    eta: float,
    decay: float,
    bound: float | None,
    count: Tensor | None,
) -> None:
    """Three dense products over the batch, in place; see ``bio_kernels.update_strength_``."""
    old = _matrix(strength)
    wide, n = torch.promote_types(old.dtype, torch.float32), old.shape[0]
    used = torch.ones_like(idx, dtype=torch.bool)
    if count is not None:
        used = torch.arange(idx.shape[1], device=idx.device) < count[:, None]
    where = idx.masked_fill(~used, 0)
    ones, pre, post = (x.to(wide).masked_fill(~used, 0) for x in (torch.ones_like(pre), pre, post))
    active, sender, receiver = (_spread(x, where, n) for x in (ones, pre, post))
    total = sender.T @ receiver - decay * (active.T @ receiver.square()) * old.to(wide)
    new = old.to(wide) + eta / max(idx.shape[0], 1) * total
    new = new if bound is None else new.clamp(-bound, bound)
    new = torch.where(active.T @ active > 0, new, old.to(wide)).to(old.dtype)
    if isinstance(strength, BlockSparse):
        strength.blocks.copy_(_stored_blocks(strength, new))
    else:
        strength.copy_(new)


def _stored_blocks(like: BlockSparse, matrix: Tensor) -> Tensor:
    p, rows = like.block_size, like.row_offsets.numel() - 1
    row = torch.repeat_interleave(torch.arange(rows, device=matrix.device), like.row_offsets.diff())
    return matrix.reshape(rows, p, rows, p).transpose(1, 2)[row, like.cols.long()]
