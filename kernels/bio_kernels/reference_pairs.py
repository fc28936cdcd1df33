"""The operations on pairs of active neurons, attention and plasticity, in plain torch at sparse cost; the CPU path.

As in ``reference``: same names and signatures as the launchers in the Triton files, sums in float32 (float64 for
float64 inputs), and the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._index import Storage
from .reference import add_, wide_dtype


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
    wide, valid = wide_dtype(q.dtype), _valid(idx, count)
    q, k, values = (_used(x, valid).to(wide) for x in (q, k, v))
    score = _scores(q, k, _used(idx, valid), storage, scale)
    weight, silent = _weights(gate, valid, wide)
    if silent is not None:
        score.masked_fill_(silent, -torch.inf)
        values = values.masked_fill(silent.transpose(-1, -2), 0)  # of what is silent nothing is heard: no 0 * inf
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
    wide, valid = wide_dtype(q.dtype), _valid(idx, count)
    wq, wk, wv, grad, wout = (_used(x, valid).to(wide) for x in (q, k, v, grad_out, out))
    e = _scores(wq, wk, _used(idx, valid), storage, scale).sub_(lse[..., None]).exp_()
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
    touched, inverse = torch.unique(offset, return_inverse=True)
    old = flat[touched].to(wide)
    pre, post = pre.to(wide)[:, :, None], post.to(wide)[:, None, :]
    change, forget = pre * post, (post * post).expand(-1, idx.shape[1], -1)
    change, forget = (x.flatten() if kept is None else x.flatten()[kept] for x in (change, forget))
    hebb, oja = torch.zeros_like(old), torch.zeros_like(old)
    add_(hebb, inverse.flatten(), change)
    add_(oja, inverse.flatten(), forget)
    new = old + eta / idx.shape[0] * (hebb - decay * oja * old)
    flat[touched] = (new if bound is None else new.clamp(-bound, bound)).to(flat.dtype)
