"""The operations on pairs of active neurons, attention and plasticity, in plain torch at sparse cost; the CPU path.

As in ``reference``: same names and signatures as the launchers in the Triton files, sums in float32 (float64 for
float64 inputs), and the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._index import Storage
from .reference import add_, wide_dtype

# One sample of 8 heads and 128 neurons: 0.5 MB in float32. Of 4 heads and 32 neurons 32 samples are as fast together as
# their arithmetic; one by one their 768 took 4 times as long as all the rest of a training step.
_CACHED_SCORES = 8 * 128 * 128


def _locate(storage: Storage, idx: Tensor) -> tuple[Tensor, Tensor | None]:
    """Flat offsets (B, K, K) of strength[idx[b, j], idx[b, i]] in storage.values, and which are stored (None: all)."""
    idx = idx.long()
    if not storage.sparse:
        return idx[:, :, None] * storage.n + idx[:, None, :], None
    p, tiles = storage.block_size, storage.n // storage.block_size
    group, pairs = idx // p, idx.numel() * idx.shape[1]
    if tiles * tiles <= pairs:  # a table of all blocks is made faster than as many searches
        z = _block_table(storage, None)[group[:, :, None] * tiles + group[:, None, :]]
    else:  # of a large pool a table of the block rows that are active, whatever the others are
        held, place = group.unique(return_inverse=True)
        if len(held) ** 2 <= pairs:
            z = _block_table(storage, held)[place[:, :, None] * len(held) + place[:, None, :]]
        else:
            z = _search_blocks(storage, group[:, :, None] * tiles + group[:, None, :])
    present = z >= 0
    offset = z * p * p + (idx % p)[:, :, None] * p + (idx % p)[:, None, :]
    return torch.where(present, offset, 0), present


def _block_table(storage: Storage, held: Tensor | None) -> Tensor:
    """(U * U,): which block, or -1, is stored at row held[i], column held[j]; held (U,) ascending, None for all."""
    row_offsets, cols = storage.layout
    first, length = row_offsets[:-1], row_offsets.diff()
    if held is not None:
        first, length = first[held], length[held]
    n = len(first)
    row = torch.repeat_interleave(torch.arange(n, device=cols.device), length)
    if held is None:
        block, place = torch.arange(len(row), device=cols.device), cols.long()
    else:
        block = (first - length.cumsum(0) + length)[row] + torch.arange(len(row), device=cols.device)
        place = torch.searchsorted(held, cols[block].long()).clamp(max=n - 1)
        kept = held[place] == cols[block]
        row, block, place = row[kept], block[kept], place[kept]
    table = torch.full((n * n,), -1, device=cols.device)
    table[row * n + place] = block
    return table


def _search_blocks(storage: Storage, wanted: Tensor) -> Tensor:
    """Which block, or -1, is stored at row * N / P + column = wanted, of any shape."""
    row_offsets, cols = storage.layout
    tiles = len(row_offsets) - 1
    keys = torch.repeat_interleave(torch.arange(tiles, device=cols.device), row_offsets.diff()) * tiles + cols
    if not keys.numel():
        return torch.full_like(wanted, -1)
    z = torch.searchsorted(keys, wanted).clamp(max=keys.numel() - 1)
    return torch.where(keys[z] == wanted, z, -1)


def _valid(idx: Tensor, count: Tensor | None) -> Tensor | None:
    """Which slots (B, K) are in use; None: all of them (on a GPU that is not asked: it would wait for the device)."""
    if count is None or (count.is_cpu and bool((count >= idx.shape[1]).all())):
        return None
    return torch.arange(idx.shape[1], device=idx.device) < count[:, None]


def _used(x: Tensor, valid: Tensor | None) -> Tensor:
    """x (B, K) or (B, H, K, D) with zeros in the slots that are not in use."""
    if valid is None:
        return x
    return x.masked_fill(~(valid if x.dim() == 2 else valid[:, None, :, None]), 0)


def _weights(gate: Tensor | None, valid: Tensor | None, wide: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The senders' gates and which are silent, both (B, 1, 1, K): None if all gates are 1, None if none is silent."""
    if gate is None:
        silent = None if valid is None else ~valid[:, None, None]
        return None, None if silent is None or not bool(silent.any()) else silent
    weight = _used(gate, valid).to(wide)[:, None, None]
    silent = weight == 0
    return weight, silent if bool(silent.any()) else None


def _bias(idx: Tensor, storage: Storage | None, wide: torch.dtype) -> Tensor | None:
    """strength[idx_j, idx_i] as (B, 1, receiver i, sender j)."""
    if storage is None:
        return None
    offset, present = _locate(storage, idx)
    if not storage.values.numel():
        return torch.zeros(offset.shape, dtype=wide, device=idx.device)[:, None]
    bias = torch.take(storage.values, offset).to(wide)  # along rows of the matrix: neighbours in memory
    bias = bias if present is None else bias.masked_fill_(~present, 0)
    return bias.transpose(1, 2).contiguous()[:, None]  # as the fused attention reads it fastest


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    storage: Storage | None,
    gate: Tensor | None,
    count: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, K, Dh) in v's dtype, and lse (B, H, K), the logarithm of its denominator (inf: none spoke).

    A gate is a bias of log(gate): torch's fused attention then needs neither the scores nor a rescaling in memory.
    """
    wide, valid = wide_dtype(q.dtype), _valid(idx, count)
    q, k, v_wide = (x.to(wide) for x in (q, k, v))  # what a padding slot asks is masked in the output
    weight, silent = _weights(gate, valid, wide)  # padding is silent
    bias = _bias(_used(idx, valid), storage, wide)
    if weight is not None:
        bias = weight.log() if bias is None else bias + weight.log()
    elif silent is not None and bias is None:
        bias = torch.zeros_like(silent, dtype=wide)
    if silent is not None and bias is not None:  # of what is silent nothing is heard, not even 0 * inf
        bias = bias.masked_fill(silent, -torch.inf)
        k, v_wide = (x.masked_fill(silent.transpose(-1, -2), 0) for x in (k, v_wide))
    out, lse = _fused_attention(q, k, v_wide, bias, scale)
    deaf = None if bias is None else bias.amax(-1).expand(-1, -1, q.shape[2]) == -torch.inf  # (B, 1, K)
    if deaf is not None and bool(deaf.any()):
        out, lse = out.masked_fill(deaf[..., None], 0), lse.masked_fill(deaf, torch.inf)
    if valid is not None:
        out, lse = _used(out, valid), lse.masked_fill(~valid[:, None], torch.inf)
    return out.to(v.dtype), lse


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention with bias (B, 1, 1 or K, K), and the log-sum-exp of its scores."""
    mask = None if bias is None else bias.expand(-1, q.shape[1], q.shape[2], -1)
    if q.is_cpu and q.numel():
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    score = (q * scale) @ k.transpose(-1, -2)
    score = score if mask is None else score + mask
    return torch.softmax(score, -1) @ v, score.logsumexp(-1)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    storage: Storage | None,
    gate: Tensor | None,
    count: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v; of the bias, (B, K pre, K post) in the wide dtype; and of the gates (B, K).

    On a CPU a few samples at a time, so that their H * K * K scores each stay in cache.
    """
    few = max(1, _CACHED_SCORES // max(q.shape[1] * q.shape[2] ** 2, 1))
    if q.is_cpu and q.shape[0] > few:
        parts = []
        for b in range(0, q.shape[0], few):
            at = slice(b, b + few)
            own = grad_out[at], q[at], k[at], v[at], idx[at]
            own_gate, own_count = None if gate is None else gate[at], None if count is None else count[at]
            parts.append(attention_backward(*own, storage, own_gate, own_count, scale, out[at], lse[at]))
        grad_q, grad_k, grad_v, grad_bias, grad_gate = zip(*parts, strict=True)
        grad_bias = None if storage is None else torch.cat(grad_bias)
        grad_gate = None if gate is None else torch.cat(grad_gate)
        return torch.cat(grad_q), torch.cat(grad_k), torch.cat(grad_v), grad_bias, grad_gate
    wide, valid = wide_dtype(q.dtype), _valid(idx, count)
    wq, grad = (_used(x, valid).to(wide) for x in (q, grad_out))
    wk, wv, wout = (x.to(wide) for x in (k, v, out))  # padding is silent, its output 0
    bias = _bias(_used(idx, valid), storage, wide)
    e = (wq * scale) @ wk.transpose(-1, -2)
    e = (e if bias is None else e.add_(bias)).sub_(lse[..., None]).exp_()
    d = (grad @ wv.transpose(-1, -2)).sub_((grad * wout).sum(-1, keepdim=True))
    weight, silent = _weights(gate, valid, wide)
    if weight is None:
        grad_gate, p = None, e
    else:
        grad_gate = _used((e * d).sum((1, 2)), valid)
        p = e.mul_(weight)
    if silent is not None:
        p.masked_fill_(silent, 0)  # never 0 * inf: where the gate is 0 exp may overflow, k and v be infinite
        d.masked_fill_(silent, 0)
        wk = wk.masked_fill(silent.transpose(-1, -2), 0)
    grad_v = p.transpose(-1, -2) @ grad
    ds = d.mul_(p)
    grad_q, grad_k = (ds @ wk).mul_(scale), (ds.transpose(-1, -2) @ wq).mul_(scale)
    grad_bias = None if storage is None else ds.sum(1).transpose(1, 2).contiguous()
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, grad_gate


def pair_gradient(delta: Tensor, idx: Tensor, count: Tensor | None, storage: Storage) -> Tensor:
    """delta (B, K pre, K post) summed into a tensor like storage.values, zeros elsewhere."""
    total = torch.zeros(storage.values.numel(), dtype=delta.dtype, device=delta.device)
    offset, kept = _pairs(storage, idx, count)
    add_(total, offset, delta.flatten() if kept is None else delta.flatten()[kept])
    return total.to(storage.values.dtype).view_as(storage.values)


def _pairs(storage: Storage, idx: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Flat offsets of all pairs of neurons in use whose connection is stored, and which of the B*K*K those are."""
    valid = _valid(idx, count)
    offset, present = _locate(storage, _used(idx, valid))
    if valid is not None:
        both = valid[:, :, None] & valid[:, None, :]
        present = both if present is None else present & both
    return (offset.flatten(), None) if present is None else (offset[present], present.flatten())


# ------------------------------------------------------------------------------------------------- plasticity


def update_strength(
    storage: Storage,
    idx: Tensor,
    pre: Tensor,
    post: Tensor,
    eta: float,
    decay: float,
    bound: float | None,
    count: Tensor | None,
) -> None:
    """In place on storage.values, which is contiguous: every pair's change is summed before any value is touched."""
    flat, wide = storage.values.view(-1), wide_dtype(storage.values.dtype)
    offset, kept = _pairs(storage, idx, count)
    if offset.numel() == 0:
        return
    pre, post = (x.to(wide) for x in (_used(pre, _valid(idx, count)), _used(post, _valid(idx, count))))
    change = (eta / idx.shape[0] * pre)[:, :, None] * post[:, None, :]
    change = change.flatten() if kept is None else change.flatten()[kept]
    if decay:
        forget = (eta / idx.shape[0] * decay * post.square())[:, None, :].expand(-1, idx.shape[1], -1)
        forget = forget.reshape(-1) if kept is None else forget.reshape(-1)[kept]
        change.addcmul_(forget, flat[offset].to(wide), value=-1)
    if flat.dtype == wide:
        add_(flat, offset, change)
        if bound is not None:
            flat[offset] = flat[offset].clamp_(-bound, bound)  # pairs that repeat write the same value
        return
    touched, inverse = torch.unique(offset, return_inverse=True)  # summed apart, to be rounded once
    new = flat[touched].to(wide)
    add_(new, inverse, change)
    flat[touched] = (new if bound is None else new.clamp_(-bound, bound)).to(flat.dtype)
