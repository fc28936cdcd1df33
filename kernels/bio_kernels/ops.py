"""The public operations: what they mean, what they refuse, and who computes them.

Axes: B batch, N neurons in the pool, K active neurons, D state width, H heads, Dh head width, M columns of a table.
strength[pre, post]: a row holds the outgoing synapses of one sending neuron.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _autograd, _checks, _registration, dense
from ._backend import resolve
from ._index import Storage
from .block_sparse import BlockSparse


class TopKGather(NamedTuple):
    """What ``topk_gather`` returns: gate (B, k), idx (B, k) int64 ascending, rows (B, k, D)."""

    gate: Tensor
    idx: Tensor
    rows: Tensor


def _storage(x: Tensor | BlockSparse) -> Storage:
    return x.storage if isinstance(x, BlockSparse) else Storage(x, x.shape[-2])


def _values(x: Tensor | BlockSparse) -> Tensor:
    return x.blocks if isinstance(x, BlockSparse) else x


def topk_gather(
    score: Tensor, table: Tensor, k: int, *, sparse_grad: bool = False, backend: str = "auto"
) -> TopKGather:
    """Select the k highest-scoring neurons of each sample and gather their rows of a table.

    idx[b] = the k neurons with the highest score[b], ascending by index; gate = score[idx]; rows = table[idx].
    Ties go to the lowest index, -0.0 equals 0.0, and NaN counts as greatest (as in torch.topk), so that it is seen.

    Args:
        score: (B, N) float32, bfloat16, float16 or float64.
        table: (N, D), or (B, N, D) where each sample has its own; same dtypes, its own choice of them.
        k: number of active neurons, 1 <= k <= N.
        sparse_grad: the gradient of a (N, D) table arrives as a torch.sparse_coo tensor, one row for each (b, j),
            not coalesced, see ``shared_table``; as in torch.gather. The dense backend ignores it.
        backend: "auto", "triton", "reference" or "dense".

    Returns:
        TopKGather(gate, idx, rows): gate (B, k) in score's dtype; idx (B, k) int64; rows (B, k, D) in table's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the backend asked for cannot run here; of more than 8192 neurons Triton selects at most 4096.

    Gradients: gate -> score, rows -> table (rows chosen by several samples add); twice differentiable.
    Determinism: the same bits every time, on every backend; idx is the same on all of them.
    Source: k-winners-take-all, Maass (2000); threshold selection instead of sorting, Alabi et al. (2012).
    """
    _checks.tensor("score", score, "(B, N)", (2,))
    _checks.tensor("table", table, "(N, D) or (B, N, D)", (2, 3))
    batch, n = score.shape
    if n == 0:
        raise ValueError(f"score must be (B, N) with N >= 1, got shape {tuple(score.shape)}")
    _checks.integer("k", k, 1, n, "N")
    width = table.shape[-1]
    _checks.size("table", table, "(N, D) or (B, N, D)", (batch, n, width) if table.dim() == 3 else (n, width))
    _checks.same_device(score=score, table=table)
    if sparse_grad and table.dim() == 3:
        raise ValueError("sparse_grad must be False for a table (B, N, D)")
    chosen = resolve(backend, score, table)
    if chosen == "dense":
        return TopKGather(*dense.topk_gather(score, table, k))
    if not _autograd.needed(score, table):
        return TopKGather(*_registration.topk_gather(score, table, k, chosen))
    return TopKGather(*_autograd.TopKGather.apply(score, table, k, sparse_grad, chosen))


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    strength: Tensor | BlockSparse | None = None,
    *,
    gate: Tensor | None = None,
    count: Tensor | None = None,
    scale: float | None = None,
    sparse_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attention among the active neurons, biased by the strength of their connections, weighted by their gates.

    e_ij = gate_j * exp(scale * q_i.k_j + strength[idx_j, idx_i]);   out_i = sum_j e_ij v_j / sum_j e_ij

    Args:
        q, k, v: (B, H, K, Dh), one dtype: float32, bfloat16, float16 or float64. Under autocast they are cast to its
            dtype; scores and sums are float32 always (float64 for float64).
        idx: (B, K) int32 or int64 in 0..N-1, no neuron twice in a sample; any order is right, ascending is fastest.
        strength: (N, N) float or BlockSparse, one bias for all heads; None for no bias.
        gate: (B, K) float >= 0, dimensionless. A neuron with gate 0 sends nothing, yet its gate has the finite gradient
            of the formula, so that it can wake up. None for ones.
        count: (B,) int32 or int64 in 0..K: only the first count[b] slots are read, the others' output is 0. None: all.
        scale: factor of q.k; None for Dh ** -0.5.
        sparse_grad: the gradient of a dense strength arrives as a torch.sparse_coo tensor of B*K*K entries, not
            coalesced, see ``shared_table``. No effect on a BlockSparse, nor on the dense backend.
        backend: "auto", "triton", "reference" or "dense".

    Returns:
        out (B, H, K, Dh) in v's dtype. Where no sender speaks, the output and all gradients are 0, never NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
            Values (range and repeats of idx, range of count, sign of gate) are checked on a CPU, and on a GPU under
            BIO_KERNELS_CHECK=1; without it, indices out of range are masked off there, never followed.
        RuntimeError: the backend asked for cannot run here.

    Gradients: q, k, v, strength (or its ``blocks``), gate. Once differentiable.
    Determinism: the same bits every time; the gradient of strength is summed by one owner for each neuron, in order.
    Source: Vaswani et al. (2017), eq. 1; additive bias as in Press et al. (2022); without atomics as in kernels/README.
    """
    _checks.tensor("q", q, "(B, H, K, Dh)", (4,))
    device = q.device.type
    if q.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) if isinstance(x, Tensor) else x for x in (q, k, v))
    for name, x in (("k", k), ("v", v)):
        _checks.tensor(name, x, "(B, H, K, Dh)", (4,), (q.dtype,))
        _checks.size(name, x, "(B, H, K, Dh) as q", tuple(q.shape))
    n = 2**62 if strength is None else _checks.square("strength", strength).shape[0]
    _checks.slots(idx, count, n)
    _checks.size("idx", idx, "(B, K) of q", (q.shape[0], q.shape[2]))
    if gate is not None:
        _checks.tensor("gate", gate, "(B, K)", (2,))
        _checks.size("gate", gate, "(B, K)", tuple(idx.shape))
    _checks.same_device(q=q, k=k, v=v, idx=idx, strength=strength, gate=gate, count=count)
    _checks.same_precision(q=q, strength=strength, gate=gate)
    if q.shape[-1] == 0:
        raise ValueError(f"q must be (B, H, K, Dh) with Dh >= 1, got shape {tuple(q.shape)}")
    factor = q.shape[-1] ** -0.5 if scale is None else _checks.number("scale", scale)
    chosen = resolve(backend, q, None if strength is None else _values(strength), gate)
    if chosen == "dense":
        _checks.values(idx, n, count, gate, distinct=True)
        if strength is None:  # without a matrix the pool's size is not known: each slot is a neuron of its own
            n, idx = idx.shape[1], torch.arange(idx.shape[1], device=idx.device).expand(idx.shape)
        return dense.sparse_attention(q, k, v, idx, strength, gate, count, factor, n)
    layout = (None, n, None, None, 0) if strength is None else _autograd.storage_args(_storage(strength))
    if not _autograd.needed(q, k, v, layout[0], gate):
        return _registration.sparse_attention(q, k, v, idx, *layout, gate, count, factor, chosen)[0]
    sparse_grad = sparse_grad and isinstance(strength, Tensor)
    return _autograd.SparseAttention.apply(q, k, v, idx, *layout, gate, count, factor, sparse_grad, chosen)[0]


def weighted_rows(
    table: Tensor | BlockSparse, idx: Tensor, weight: Tensor, *, sparse_grad: bool = False, backend: str = "auto"
) -> Tensor:
    """The weighted sum of chosen rows of a table: out_b = sum_j weight[b, j] * table[idx[b, j]].

    With table = strength it spreads activation along outgoing synapses; with table = readout it decodes a pattern.

    Args:
        table: (N, M) float32, bfloat16, float16 or float64; (B, N, M) where each sample has its own; or BlockSparse
            (N, N), M = N.
        idx: (B, K) int32 or int64 in 0..N-1; repeats add.
        weight: (B, K) float, dimensionless; its own dtype.
        sparse_grad: the gradient of a (N, M) table arrives as a torch.sparse_coo tensor of B*K rows (on a CPU, of
            single entries if most of out's gradient is 0), not coalesced, see ``shared_table``. No effect on a
            BlockSparse, nor on the dense backend.
        backend: "auto", "triton", "reference" or "dense".

    Returns:
        out (B, M) in table's dtype, summed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
            The range of idx is checked on a CPU, and on a GPU under BIO_KERNELS_CHECK=1; without it, indices out of
            range are masked off there, never followed.
        RuntimeError: the backend asked for cannot run here.

    Gradients: table (or its ``blocks``), weight. Once differentiable.
    Determinism: the same bits every time; no atomics.
    Source: a bag of embeddings with weights, Joulin et al. (2016), eq. in section 2.1.
    """
    if isinstance(table, BlockSparse):
        n, batch = table.shape[0], None
    else:
        _checks.tensor("table", table, "(N, M) or (B, N, M)", (2, 3))
        n, batch = table.shape[-2], table.shape[0] if table.dim() == 3 else None
    _checks.tensor("idx", idx, "(B, K)", (2,), _checks.INDICES)
    if n == 0 or table.shape[-1] == 0 or idx.shape[1] == 0:
        raise ValueError(f"table and idx must hold rows, got shapes {tuple(table.shape)} and {tuple(idx.shape)}")
    if batch is not None and batch != idx.shape[0]:
        raise ValueError(f"table must be (B, N, M) with B = {idx.shape[0]} as idx, got shape {tuple(table.shape)}")
    _checks.tensor("weight", weight, "(B, K)", (2,))
    _checks.size("weight", weight, "(B, K) as idx", tuple(idx.shape))
    _checks.same_device(table=table, idx=idx, weight=weight)
    _checks.same_precision(table=table, weight=weight)
    if sparse_grad and batch is not None:
        raise ValueError("sparse_grad must be False for a table (B, N, M)")
    chosen = resolve(backend, _values(table), weight)
    if chosen == "dense":
        _checks.values(idx, n)
        return dense.weighted_rows(table, idx, weight)
    layout = _autograd.storage_args(_storage(table))
    if not _autograd.needed(layout[0], weight):
        return _registration.weighted_rows(*layout, idx, weight, chosen)
    sparse_grad = sparse_grad and isinstance(table, Tensor)
    return _autograd.WeightedRows.apply(*layout, idx, weight, sparse_grad, chosen)


def update_strength_(
    strength: Tensor | BlockSparse,
    idx: Tensor,
    pre: Tensor,
    post: Tensor,
    *,
    eta: float,
    decay: float = 0.0,
    bound: float | None = None,
    count: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | BlockSparse:
    """Strengthen, in place, the connections between neurons that were active together.

    For every pair (p, q) of neurons active together in at least one sample:
    strength[p, q] += eta / B * sum_b [p, q in idx_b] * (pre_bp * post_bq - decay * post_bq^2 * strength_old[p, q]),
    then clamp to [-bound, bound]. decay = 0 is plain Hebb, decay = 1 is Oja's rule on co-active pairs.

    Args:
        strength: (N, N) float32, bfloat16, float16 or float64, or BlockSparse, of which only stored blocks change.
        idx: (B, K) int32 or int64 in 0..N-1, no neuron twice in a sample.
        pre, post: (B, K) float: activity of each active neuron as sender and as receiver, dimensionless.
        eta: finite plasticity rate, fraction per step.
        decay: finite weight of forgetting, dimensionless.
        bound: finite and >= 0, or None for no clamp; pairs that were not active together are never clamped.
        count: (B,) int32 or int64 in 0..K: only the first count[b] slots take part. None for all.
        backend: "auto", "triton", "reference" or "dense".

    Returns:
        strength itself. Where an error is raised, nothing was changed.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
            Values of idx and count are checked on a CPU, and on a GPU under BIO_KERNELS_CHECK=1.
        RuntimeError: the backend asked for cannot run here.

    Gradients: none flow through the update; a leaf that requires gradients may be updated.
    Determinism: the same bits every time; changes are summed in float32 (float64 for float64) and rounded once.
    Source: Hebb (1949); Oja (1982), eq. 3.
    """
    values = _values(_checks.square("strength", strength))
    _checks.writable("strength", values)
    _checks.slots(idx, count, strength.shape[0])
    for name, x in (("pre", pre), ("post", post)):
        _checks.tensor(name, x, "(B, K)", (2,))
        _checks.size(name, x, "(B, K) as idx", tuple(idx.shape))
    _checks.same_device(strength=strength, idx=idx, pre=pre, post=post, count=count)
    _checks.same_precision(strength=strength, pre=pre, post=post)
    eta, decay = _checks.number("eta", eta), _checks.number("decay", decay)
    bound = None if bound is None else _checks.number("bound", bound, low=0.0)
    chosen = resolve(backend, values, pre, post)
    pre, post = pre.detach(), post.detach()
    with torch.no_grad():
        if chosen == "dense":
            _checks.values(idx, strength.shape[0], count, distinct=True)
            dense.update_strength(strength, idx, pre, post, eta, decay, bound, count)
        else:
            args = _autograd.storage_args(_storage(strength))
            _registration.update_strength_(*args, idx, pre, post, eta, decay, bound, count, chosen)
    return strength


def shared_table(table: Tensor, uses: int) -> tuple[Tensor, ...]:
    """Aliases of one table for operations that each take a gradient of it with ``sparse_grad=True``.

    A table that is used several times in a step (the connection strength, twice in each interaction step) would get as
    many N x N gradients, made, filled and added. Through its aliases they stay as small as the active neurons, and are
    summed into one strided gradient when the last has come.

    Args:
        table: any strided tensor.
        uses: how many aliases, >= 1. Hand each to one operation.

    Returns:
        A tuple of ``uses`` tensors that share table's memory. While torch.compile traces, the table itself, ``uses``
        times: sparse gradients are not traced.

    Raises:
        TypeError, ValueError: table is not a strided tensor, or uses < 1.

    Gradients: the sum of the aliases' gradients, strided, in a fixed order; torch alone adds uncoalesced ones on a GPU
        by atomics, in none.
    """
    _checks.tensor("table", table, "of any shape", tuple(range(9)))
    _checks.integer("uses", uses, 1, 2**31, "2**31")
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and table.requires_grad):
        return (table,) * uses
    return _autograd.SharedTable.apply(table, uses)
