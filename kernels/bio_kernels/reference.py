"""The operations on rows of a table, in plain torch at sparse cost, on any device; the CPU path. Equations: ``ops``.

Same names and signatures as the launchers in the Triton files, so that an operator takes either. Sums are float32
(float64 for float64 inputs). Weighted sums of rows are one bag: on a CPU ``embedding_bag`` reads each row
once and never materialises the gathered rows, and run over the inverted index it sums gradients just as well. The order
of its terms is fixed, so results are the same bits every time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._index import Storage, inverted


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are summed in."""
    return torch.promote_types(dtype, torch.float32)


def add_(flat: Tensor, offset: Tensor, values: Tensor) -> None:
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
    """Of a sort-free top-k only the set counts; where the k-th value is tied, or NaN, ``_lowest_of_ties`` decides."""
    n = score.shape[1]
    best = torch.topk(score, min(k + 1, n), dim=1)
    if k == n or bool((best.values[:, k - 1] > best.values[:, k]).all()):
        idx = best.indices[:, :k].sort(dim=1).values
    else:
        idx = _lowest_of_ties(score, k)
    gate = score.gather(1, idx)
    flat = _flat_index(idx, n, table.dim() == 3)
    return gate, idx, F.embedding(flat, table.reshape(-1, table.shape[-1]))


def _lowest_of_ties(score: Tensor, k: int) -> Tensor:
    """idx (B, k): the k-th highest value is the threshold; what is above it is in, and of its equals the first ones."""
    threshold = torch.topk(score, k, dim=1).values[:, -1:]
    nan = threshold.isnan()
    above = ~((score <= threshold) | nan)
    equal = (score == threshold) | (nan & score.isnan())
    chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return chosen.nonzero()[:, 1].clone().view(-1, k)  # memory of its own, without the column of samples


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
    if values.is_cpu and values.dim() == 3 and weight is None and values.dtype == wide_dtype(values.dtype):
        out = values.new_zeros(rows, width)  # rows as they are, one after another: no index is needed for that order
        out.index_add_(0, _flat_index(idx, n, per_sample).flatten(), values.reshape(-1, width))
        return out.to(dtype).view(batch, n, width) if per_sample else out.to(dtype)
    keys, entry = inverted(_flat_index(idx, n, per_sample), rows)
    offsets = torch.searchsorted(keys, torch.arange(rows, device=idx.device, dtype=keys.dtype))
    ordered = None if weight is None else weight.flatten()[entry].to(wide_dtype(values.dtype))
    source = (entry if values.dim() == 3 else entry // k).long()
    out = _bag(values.reshape(-1, width).to(wide_dtype(values.dtype)), source, offsets, ordered).to(dtype)
    return out.view(batch, n, width) if per_sample else out


# ------------------------------------------------------------------------------------------------- weighted rows


def weighted_rows_forward(table: Tensor | Storage, idx: Tensor, weight: Tensor) -> Tensor:
    if isinstance(table, Storage):
        return _spread_blocks(table, idx, weight)
    (batch, k), width = idx.shape, table.shape[-1]
    rows, flat = table.reshape(-1, width), _flat_index(idx, table.shape[-2], table.dim() == 3)
    if rows.dtype == wide_dtype(rows.dtype):
        offsets = torch.arange(0, batch * k, k, device=idx.device)
        return _bag(rows, flat.flatten(), offsets, weight.to(rows.dtype).flatten())
    samples = [w.float() @ rows[i].float() for w, i in zip(weight, flat, strict=True)]
    return torch.stack(samples).to(table.dtype) if samples else rows.new_zeros(0, width)


def weighted_rows_backward_weight(table: Tensor | Storage, idx: Tensor, grad_out: Tensor) -> Tensor:
    """(B, K): the dot product of each chosen row with its sample's gradient."""
    wide = wide_dtype(grad_out.dtype)
    if isinstance(table, Storage):
        entry, block, tile = _block_entries(table, idx)
        own = table.values.reshape(-1, table.block_size)[block].to(wide)
        dots = (own * grad_out.reshape(-1, table.block_size)[tile].to(wide)).sum(-1)
        out = dots.new_zeros(idx.numel())
        add_(out, entry, dots)
        return out.view(idx.shape)
    rows = table.reshape(-1, table.shape[-1])
    flat = _flat_index(idx, table.shape[-2], table.dim() == 3)
    few = nonzero_entries(grad_out) if rows.dtype == wide else None
    if few is not None:
        sample, column, value = few
        dots = rows[flat[sample], column[:, None]] * value.to(wide)[:, None]
        return dots.new_zeros(idx.shape).index_add_(0, sample, dots)
    if rows.dtype == wide and idx.numel():  # reads the rows where they are, without gathering them
        starts = torch.arange(0, idx.numel(), idx.shape[1], device=idx.device).to(idx.dtype)
        sample = (torch.arange(idx.numel(), device=idx.device) // idx.shape[1]).to(idx.dtype)
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
        return dots(grad_out.to(wide), rows, flat.flatten(), starts, sample, 0).view(idx.shape)
    samples = [rows[i].to(wide) @ g.to(wide) for i, g in zip(flat, grad_out, strict=True)]
    return torch.stack(samples) if samples else grad_out.new_zeros(idx.shape, dtype=wide)


def nonzero_entries(grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """(sample, column, value) of grad_out (B, M) where it is mostly zeros, as behind a top-k; None where it is not, or
    on a GPU, where looking would wait for the device."""
    if not grad_out.is_cpu:
        return None
    sample, column = grad_out.nonzero(as_tuple=True)
    return None if 8 * sample.numel() > grad_out.numel() else (sample, column, grad_out[sample, column])


def weighted_rows_backward_table(table: Tensor | Storage, idx: Tensor, weight: Tensor, grad_out: Tensor) -> Tensor:
    """Gradient of the table's values, in their shape and dtype: weight[b, j] * grad_out[b] added to row idx[b, j]."""
    if not isinstance(table, Storage):
        return segment_rows(idx, grad_out, weight, table.shape[-2], table.dtype, table.dim() == 3)
    p = table.block_size
    entry, block, tile = _block_entries(table, idx)
    keys, order = torch.sort(block, stable=True)
    rows = table.values.shape[0] * p
    offsets = torch.searchsorted(keys, torch.arange(rows, device=idx.device))
    wide = wide_dtype(grad_out.dtype)
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
    p, wide = storage.block_size, wide_dtype(storage.values.dtype)
    entry, block, tile = _block_entries(storage, idx)
    keys, order = torch.sort(tile, stable=True)
    offsets = torch.searchsorted(keys, torch.arange(idx.shape[0] * (storage.n // p), device=idx.device))
    block, ordered = block[order], weight.flatten()[entry[order]].to(wide)
    rows = storage.values.reshape(-1, p)
    if rows.dtype != wide:  # only the rows in use are widened
        rows, block = rows[block].to(wide), torch.arange(block.numel(), device=idx.device)
    return _bag(rows, block, offsets, ordered).view(idx.shape[0], storage.n).to(storage.values.dtype)
