"""The operations in plain torch with the signatures of bio_kernels, and ways to have a SPROUT run on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import bio_kernels
import torch
import torch.nn.functional as F
from bio_kernels import TopKGather
from torch import Tensor

from . import peers


def topk_gather(score: Tensor, table: Tensor, k: int, **_) -> TopKGather:
    gate, idx = torch.topk(score, k, dim=1)
    idx, order = idx.sort(1)  # a pattern lists its neurons in ascending order
    return TopKGather(gate.gather(1, order), idx, table[idx])


def weighted_rows(table: Tensor, idx: Tensor, weight: Tensor, **_) -> Tensor:
    return peers.naive_weighted_rows(table, idx, weight)


def _bias(strength: Tensor, idx: Tensor, gate: Tensor, used: Tensor) -> Tensor:
    """(B, 1, i, j): strength of j to i and the logarithm of j's gate, -inf where slot j is not in use."""
    bias = strength[idx[:, None, :], idx[:, :, None]] + gate.clamp(min=1e-30).log()[:, None, :]
    return bias.masked_fill(~used[:, None, :], -torch.inf)[:, None]


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, strength: Tensor, *, gate: Tensor, count: Tensor, **_
) -> Tensor:
    """Slots that are not in use get no weight: their gate is 0, and so is their output."""
    used = torch.arange(idx.shape[1], device=idx.device) < count[:, None]
    bias = _bias(strength, idx, gate, used)
    score = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5 + bias
    return torch.einsum("bhij,bhjd->bhid", score.softmax(-1), v) * used[:, None, :, None]


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, strength: Tensor, *, gate: Tensor, count: Tensor, **_
) -> Tensor:
    """The same by scaled_dot_product_attention."""
    used = torch.arange(idx.shape[1], device=idx.device) < count[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_bias(strength, idx, gate, used))
    return out * used[:, None, :, None]


def bag(table: Tensor, idx: Tensor, weight: Tensor, **_) -> Tensor:
    return peers.embedding_bag(table, idx, weight)


def update_strength_(
    strength: Tensor,
    idx: Tensor,
    pre: Tensor,
    post: Tensor,
    *,
    eta: float,
    decay: float = 0.0,
    bound: float | None = None,
    count: Tensor,
    **_,
) -> Tensor:
    """Padding slots hold neuron 0 with gate 0, which adds nothing to its connections."""
    return peers.naive_update(strength, idx, pre, post, eta, decay, float("inf") if bound is None else bound)


def shared_table(table: Tensor, uses: int) -> tuple[Tensor, ...]:
    return (table,) * uses


def dense_fused_attention(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, strength: Tensor, *, gate: Tensor, count: Tensor, **_
) -> Tensor:
    """Attention of all N neurons with all, silent ones masked, by scaled_dot_product_attention: keeps no (H, N, N)."""
    (batch, heads, _slots, width), n = q.shape, strength.shape[0]
    used = torch.arange(idx.shape[1], device=idx.device) < count[:, None]
    where = torch.where(used, idx, n)
    spread = where[:, None, :, None].expand_as(q)
    full = [x.new_zeros(batch, heads, n + 1, width).scatter(2, spread, x)[:, :, :n] for x in (q, k, v)]
    speaks = gate.new_zeros(batch, n + 1).scatter(1, where, gate)[:, :n].log()
    out = F.scaled_dot_product_attention(*full, attn_mask=(strength.T + speaks[:, None, :])[:, None])
    return out.gather(2, idx[:, None, :, None].expand_as(q)) * used[:, None, :, None]


@contextmanager
def naive_operations() -> Iterator[None]:
    """Within it sprout, which looks the operations up when it calls them, runs on the functions of this file."""
    own = (topk_gather, weighted_rows, sparse_attention, update_strength_, shared_table)
    with _replaced(**{f.__name__: f for f in own}):
        yield


@contextmanager
def fused_operations() -> Iterator[None]:
    """The same with what torch has fused: embedding_bag for weighted_rows, scaled_dot_product_attention."""
    with naive_operations(), _replaced(weighted_rows=bag, sparse_attention=fused_attention):
        yield


def dense_fused_operations() -> AbstractContextManager:
    """Within it a sprout on the dense backend has its N x N attention computed by a fused kernel."""
    return _replaced(sparse_attention=dense_fused_attention)


def _replaced(**functions: Any) -> AbstractContextManager:
    return mock.patch.multiple(bio_kernels, **functions)  # pyright: ignore[reportCallIssue]
