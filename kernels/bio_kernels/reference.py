"""What each operation means, in plain torch at sparse cost, on any device; the CPU path. See ``ops`` for the equations.

Same names and signatures as the launchers in the Triton files, so that ``_autograd`` takes either. Sums are float32
(float64 for float64 inputs). Everything that adds rows is one weighted bag: on a CPU ``embedding_bag`` reads each row
once and never materialises the gathered rows, and run over the inverted index it sums gradients just as well. The order
of its terms is fixed, so results are the same bits every time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._index import Storage, inverted


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _add_(flat: Tensor, offset: Tensor, values: Tensor) -> None:
    """flat[offset] += values with repeats, in an order that is the same every time."""
    if flat.is_cpu:
        flat.index_add_(0, offset, values)
    else:
        flat.index_put_((offset,), values, accumulate=True)  # sorts on a GPU, where index_add_ uses atomics


def _bag(rows: Tensor, index: Tensor, offsets: Tensor, weight: Tensor | None) -> Tensor:
    """out[g] = sum over e in offsets[g] .. offsets[g + 1] - 1 of weight[e] * rows[index[e]]; rows (R, D) wide."""
    if index.numel() == 0:
        return rows.new_zeros(offsets.numel(), rows.shape[1])
    return F.embedding_bag(index, rows, offsets.to(index.dtype), per_sample_weights=weight, mode="sum")


# ------------------------------------------------------------------------------------------------- top-k gather


def topk_gather_forward(score: Tensor, table: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th highest value is the threshold; what is above it is in, and of its equals the first ones."""
    batch, n = score.shape
    threshold = torch.topk(score, k, dim=1).values[:, -1:]
    nan = threshold.isnan()
    above = ~((score <= threshold) | nan)
    equal = (score == threshold) | (nan & score.isnan())
    if batch * k == int(above.sum() + equal.sum()):  # no ties to break
        chosen = above | equal
    else:
        chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    idx = chosen.nonzero()[:, 1].view(batch, k)
    gate = score.gather(1, idx)
    flat = _flat_index(idx, n, table.dim() == 3)
    return gate, idx, table.reshape(-1, table.shape[-1]).index_select(0, flat.flatten()).view(batch, k, -1)


def _flat_index(idx: Tensor, n: int, per_sample: bool) -> Tensor:
    """Row numbers in a table that is flattened to (N, D), or to (B * N, D) where each sample has its own."""
    return idx + n * torch.arange(idx.shape[0], device=idx.device)[:, None] if per_sample else idx


def scatter_gate(grad_gate: Tensor, idx: Tensor, n: int) -> Tensor:
    """(B, N): grad_gate (B, K) at idx, zeros elsewhere."""
    return grad_gate.new_zeros(idx.shape[0], n).scatter_(1, idx, grad_gate)


def segment_rows(
    idx: Tensor, values: Tensor, weight: Tensor | None, n: int, dtype: torch.dtype, per_sample: bool
) -> Tensor:
    """out[i] = sum of weight * value over the entries (b, j) with idx[b, j] = i: (N, D), or (B, N, D) if per_sample.

    values (B, K, D), or (B, D) where all entries of a sample share theirs; weight (B, K) or None for ones.
    """
    (batch, k), width = idx.shape, values.shape[-1]
    rows = n * batch if per_sample else n
    keys, entry = inverted(_flat_index(idx, n, per_sample), rows)
    offsets = torch.searchsorted(keys, torch.arange(rows, device=idx.device, dtype=keys.dtype))
    ordered = None if weight is None else weight.flatten()[entry].to(_wide(values.dtype))
    source = (entry if values.dim() == 3 else entry // k).long()
    out = _bag(values.reshape(-1, width).to(_wide(values.dtype)), source, offsets, ordered).to(dtype)
    return out.view(batch, n, width) if per_sample else out


# ------------------------------------------------------------------------------------------------- weighted rows


def weighted_rows_forward(table: Tensor | Storage, idx: Tensor, weight: Tensor) -> Tensor:
    if isinstance(table, Storage):
        return _spread_blocks(table, idx, weight)
    (batch, k), width = idx.shape, table.shape[-1]
    rows, flat = table.reshape(-1, width), _flat_index(idx, table.shape[-2], table.dim() == 3)
    if rows.dtype == _wide(rows.dtype):
        offsets = torch.arange(0, batch * k, k, device=idx.device)
        return _bag(rows, flat.flatten(), offsets, weight.to(rows.dtype).flatten())
    samples = [w.float() @ rows[i].float() for w, i in zip(weight, flat, strict=True)]
    return torch.stack(samples).to(table.dtype) if samples else rows.new_zeros(0, width)


def weighted_rows_backward_weight(table: Tensor | Storage, idx: Tensor, grad_out: Tensor) -> Tensor:
    """(B, K): the dot product of each chosen row with its sample's gradient."""
    wide = _wide(grad_out.dtype)
    if isinstance(table, Storage):
        entry, block, tile = _block_entries(table, idx)
        own = table.values.reshape(-1, table.block_size)[block].to(wide)
        dots = (own * grad_out.reshape(-1, table.block_size)[tile].to(wide)).sum(-1)
        out = dots.new_zeros(idx.numel())
        _add_(out, entry, dots)
        return out.view(idx.shape)
    rows = table.reshape(-1, table.shape[-1])
    flat = _flat_index(idx, table.shape[-2], table.dim() == 3)
    samples = [rows[i].to(wide) @ g.to(wide) for i, g in zip(flat, grad_out, strict=True)]
    return torch.stack(samples) if samples else grad_out.new_zeros(idx.shape, dtype=wide)


def weighted_rows_backward_table(table: Tensor | Storage, idx: Tensor, weight: Tensor, grad_out: Tensor) -> Tensor:
    """Gradient of the table's values, in their shape and dtype: weight[b, j] * grad_out[b] added to row idx[b, j]."""
    if not isinstance(table, Storage):
        return segment_rows(idx, grad_out, weight, table.shape[-2], table.dtype, table.dim() == 3)
    p = table.block_size
    entry, block, tile = _block_entries(table, idx)
    keys, order = torch.sort(block, stable=True)
    rows = table.values.shape[0] * p
    offsets = torch.searchsorted(keys, torch.arange(rows, device=idx.device))
    wide = _wide(grad_out.dtype)
    ordered = weight.flatten()[entry[order]].to(wide)
    return _bag(grad_out.reshape(-1, p).to(wide), tile[order], offsets, ordered).to(table.values.dtype).view(-1, p, p)


def _block_entries(storage: Storage, idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All stored pieces of the rows idx (B, K): which (b, j) it belongs to, its row in blocks.view(Z * P, P), and the
    piece (b, block column) of a (B, N) tensor that it meets, in blocks of P. Each (E,) int64."""
    p, tiles, (row_offsets, cols) = storage.block_size, storage.n // storage.block_size, storage.layout
    flat = idx.flatten().long()
    first = row_offsets[flat // p].long()
    length = row_offsets[flat // p + 1] - first
    entry = torch.repeat_interleave(torch.arange(flat.numel(), device=idx.device), length)
    start = torch.cumsum(length, 0) - length
    z = first[entry] + torch.arange(entry.numel(), device=idx.device) - start[entry]
    sample = entry // max(idx.shape[1], 1)
    return entry, z * p + flat[entry] % p, sample * tiles + cols[z].long()


def _spread_blocks(storage: Storage, idx: Tensor, weight: Tensor) -> Tensor:
    p, wide = storage.block_size, _wide(storage.values.dtype)
    entry, block, tile = _block_entries(storage, idx)
    keys, order = torch.sort(tile, stable=True)
    offsets = torch.searchsorted(keys, torch.arange(idx.shape[0] * (storage.n // p), device=idx.device))
    block, ordered = block[order], weight.flatten()[entry[order]].to(wide)
    rows = storage.values.reshape(-1, p)
    if rows.dtype != wide:  # only the rows in use are widened
        rows, block = rows[block].to(wide), torch.arange(block.numel(), device=idx.device)
    return _bag(rows, block, offsets, ordered).view(idx.shape[0], storage.n).to(storage.values.dtype)


# ------------------------------------------------------------------------------------------------- attention


def _locate(storage: Storage, idx: Tensor) -> tuple[Tensor, Tensor | None]:
    """Flat offsets (B, K, K) of strength[idx[b, j], idx[b, i]] in storage.values, and which are stored (None: all)."""
    idx = idx.long()
    if not storage.sparse:
        return idx[:, :, None] * storage.n + idx[:, None, :], None
    p, tiles, (row_offsets, cols) = storage.block_size, storage.n // storage.block_size, storage.layout
    keys = torch.repeat_interleave(torch.arange(tiles, device=idx.device), row_offsets.diff()) * tiles + cols
    wanted = (idx // p)[:, :, None] * tiles + (idx // p)[:, None, :]
    z = torch.searchsorted(keys, wanted)
    present = (z < keys.numel()) & (keys[z.clamp(max=max(keys.numel() - 1, 0))] == wanted if keys.numel() else False)
    offset = z * p * p + (idx % p)[:, :, None] * p + (idx % p)[:, None, :]
    return torch.where(present, offset, 0), present


def _valid(idx: Tensor, count: Tensor | None) -> Tensor | None:
    return None if count is None else torch.arange(idx.shape[1], device=idx.device) < count[:, None]


def _used(x: Tensor, valid: Tensor | None) -> Tensor:
    """x (B, K) or (B, H, K, D) with zeros in the slots that are not in use."""
    if valid is None:
        return x
    return x.masked_fill(~(valid if x.dim() == 2 else valid[:, None, :, None]), 0)


def _scores(q: Tensor, k: Tensor, idx: Tensor, storage: Storage | None, scale: float) -> Tensor:
    """scale * q_i.k_j + strength[idx_j, idx_i]: (B, H, i, j), in q's dtype, which is the wide one."""
    score = (q * scale) @ k.transpose(-1, -2)
    if storage is not None and storage.values.numel():
        offset, present = _locate(storage, idx)
        bias = storage.values.reshape(-1)[offset].to(q.dtype)
        bias = bias if present is None else bias.masked_fill(~present, 0)
        score += bias.transpose(1, 2)[:, None]
    return score


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
    """The output (B, H, K, Dh) in v's dtype, and lse (B, H, K), the logarithm of its denominator (inf: none spoke)."""
    wide, valid = _wide(q.dtype), _valid(idx, count)
    q, k, values = (_used(x, valid).to(wide) for x in (q, k, v))
    score = _scores(q, k, _used(idx, valid), storage, scale)
    silent = None if valid is None else ~valid[:, None, None]
    weight = None
    if gate is not None:
        weight = _used(gate, valid).to(wide)[:, None, None]
        silent = weight == 0
    if silent is not None and bool(silent.any()):
        score.masked_fill_(silent, -torch.inf)
    top = score.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)
    e = score.sub_(top).exp_()
    if weight is not None:
        e *= weight
    total = e.sum(-1, keepdim=True)
    lse = torch.where(total == 0, torch.inf, top + total.log())[..., 0]
    out = (e @ values) / torch.where(total == 0, 1.0, total)
    if valid is not None:
        out.masked_fill_(~valid[:, None, :, None], 0)
        lse.masked_fill_(~valid[:, None], torch.inf)
    return out.to(v.dtype), lse


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
    """Gradients of q, k, v; of the bias, (B, K pre, K post) in the wide dtype; and of the gates (B, K)."""
    wide, valid = _wide(q.dtype), _valid(idx, count)
    wq, wk, wv, grad, wout = (_used(x, valid).to(wide) for x in (q, k, v, grad_out, out))
    e = _scores(wq, wk, _used(idx, valid), storage, scale).sub_(lse[..., None]).exp_()
    if valid is not None:
        e.masked_fill_(~valid[:, None, None], 0)
    d = (grad @ wv.transpose(-1, -2)).sub_((grad * wout).sum(-1, keepdim=True))
    p, grad_gate = e, None
    if gate is not None:
        weight = _used(gate, valid).to(wide)[:, None, None]
        grad_gate = (e * d).sum((1, 2))
        p = torch.where(weight == 0, 0.0, e * weight)  # exp may overflow where the gate is 0: never 0 * inf
    grad_v = p.transpose(-1, -2) @ grad
    ds = d.mul_(p)
    grad_q, grad_k = (ds @ wk).mul_(scale), (ds.transpose(-1, -2) @ wq).mul_(scale)
    grad_bias = None if storage is None else ds.sum(1).transpose(1, 2).contiguous()
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, grad_gate


def pair_gradient(delta: Tensor, idx: Tensor, count: Tensor | None, storage: Storage) -> Tensor:
    """delta (B, K pre, K post) summed into a tensor like storage.values, zeros elsewhere."""
    total = torch.zeros(storage.values.numel(), dtype=delta.dtype, device=delta.device)
    offset, kept = _pairs(storage, idx, count)
    _add_(total, offset, delta.flatten() if kept is None else delta.flatten()[kept])
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
    flat, wide = storage.values.view(-1), _wide(storage.values.dtype)
    offset, kept = _pairs(storage, idx, count)
    if offset.numel() == 0:
        return
    touched, inverse = torch.unique(offset, return_inverse=True)
    old = flat[touched].to(wide)
    pre, post = pre.to(wide)[:, :, None], post.to(wide)[:, None, :]
    change, forget = pre * post, (post * post).expand(-1, idx.shape[1], -1)
    change, forget = (x.flatten() if kept is None else x.flatten()[kept] for x in (change, forget))
    hebb, oja = torch.zeros_like(old), torch.zeros_like(old)
    _add_(hebb, inverse.flatten(), change)
    _add_(oja, inverse.flatten(), forget)
    new = old + eta / idx.shape[0] * (hebb - decay * oja * old)
    flat[touched] = (new if bound is None else new.clamp(-bound, bound)).to(flat.dtype)
