"""The autograd Functions: they save tensors, call the opaque operators of ``_registration``, and nothing else.

A Function over opaque operators, rather than derivatives registered with the operator: it is the layering that compiles
without graph breaks, exports as one node, works under torch.func.grad, and says so where it cannot differentiate
(forward mode, and twice for the operators whose backward is not itself made of differentiable parts).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from . import _registration as op
from ._index import Storage
from ._operator import transformed
from .reference import nonzero_entries, wide_dtype


class ScatterGate(Function):
    """(B, K) gates at idx of a (B, N) row of zeros; its derivative gathers them."""

    @staticmethod
    def forward(gate: Tensor, idx: Tensor, n: int, backend: str) -> Tensor:
        return op.scatter_gate(gate, idx, n, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.gather(1, ctx.saved_tensors[0]), None, None, None


class SegmentRows(Function):
    """Sums of rows (B, K, D) by neuron, the derivative of a gather; its derivative is the gather."""

    @staticmethod
    def forward(values: Tensor, idx: Tensor, n: int, dtype: torch.dtype, per_sample: bool, backend: str) -> Tensor:
        return op.segment_rows(idx, values, n, dtype, per_sample, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad: Tensor):
        (idx,) = ctx.saved_tensors
        if grad.dim() == 3:
            rows = grad.gather(1, idx[:, :, None].expand(-1, -1, grad.shape[-1]))
        else:
            rows = grad[idx]
        return rows.to(ctx.dtype), None, None, None, None, None


class Once(Function):
    """An operator of a backward pass, by name: as a Function of its own it runs inside function transforms too."""

    @staticmethod
    def forward(name: str, *args):
        return getattr(op, name)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *grads: Tensor):
        raise NotImplementedError(
            f"bio_kernels cannot differentiate {ctx.name}: of the operations only topk_gather has second derivatives"
        )


def once(name: str, *args):
    """``Once``; while torch.compile traces, which differentiates what it traces, the operator itself."""
    return getattr(op, name)(*args) if torch.compiler.is_compiling() else Once.apply(name, *args)


def needed(*inputs: Tensor | None) -> bool:
    """Whether a Function has anything to do: where nothing asks for a gradient the operator alone is cheaper."""
    if transformed():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


class TopKGather(Function):
    """score (B, N), table (N, D) or (B, N, D) -> gate (B, k), idx (B, k), rows (B, k, D)."""

    @staticmethod
    def forward(score: Tensor, table: Tensor, k: int, sparse_grad: bool, backend: str):
        return op.topk_gather(score, table, k, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        score, table, _, ctx.sparse_grad, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.n, ctx.table_shape, ctx.table_dtype = score.shape[1], table.shape, table.dtype

    @staticmethod
    def backward(ctx, grad_gate: Tensor, _: Tensor, grad_rows: Tensor):
        (idx,) = ctx.saved_tensors
        grad_score = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_score = ScatterGate.apply(grad_gate, idx, ctx.n, ctx.backend)
        if ctx.needs_input_grad[1] and ctx.sparse_grad:
            rows = grad_rows.flatten(0, 1).to(ctx.table_dtype)
            grad_table = torch.sparse_coo_tensor(idx.flatten()[None], rows, ctx.table_shape, check_invariants=False)
        elif ctx.needs_input_grad[1]:
            per_sample = len(ctx.table_shape) == 3
            grad_table = SegmentRows.apply(grad_rows, idx, ctx.n, ctx.table_dtype, per_sample, ctx.backend)
        return grad_score, grad_table, None, None, None


class WeightedRows(Function):
    """table values (N, M), (B, N, M) or blocks (Z, P, P), idx (B, K), weight (B, K) -> (B, M)."""

    @staticmethod
    def forward(table, n, row_offsets, cols, search_steps, idx, weight, sparse_grad, backend):
        return op.weighted_rows(table, n, row_offsets, cols, search_steps, idx, weight, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        table, ctx.n, row_offsets, cols, ctx.search_steps, idx, weight, ctx.sparse_grad, ctx.backend = inputs
        ctx.save_for_backward(table, row_offsets, cols, idx, weight)

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        table, row_offsets, cols, idx, weight = ctx.saved_tensors
        args = (table, ctx.n, row_offsets, cols, ctx.search_steps, idx, weight, grad_out)
        grad_table = grad_weight = None
        if ctx.needs_input_grad[0] and ctx.sparse_grad:
            grad_table = _rows_coo(table, idx, weight, grad_out)
        elif ctx.needs_input_grad[0]:
            grad_table = once("weighted_rows_backward_table", *args, ctx.backend)
        if ctx.needs_input_grad[6]:
            grad_weight = once("weighted_rows_backward_weight", *args, ctx.backend)
        return grad_table, None, None, None, None, None, grad_weight, None, None


def _rows_coo(table: Tensor, idx: Tensor, weight: Tensor, grad_out: Tensor) -> Tensor:
    """The gradient of a table (N, M) as a sparse COO tensor: of whole rows, or of single entries where grad_out is
    mostly zeros."""
    wide = wide_dtype(table.dtype)
    idx, outside = _inside(idx, table.shape[0])
    few = nonzero_entries(grad_out)
    if few is None:
        where = idx.flatten()[None]
        values = weight.to(wide)[:, :, None] * grad_out.to(wide)[:, None, :]
        values = (values if outside is None else values.masked_fill(outside[:, :, None], 0)).flatten(0, 1)
    else:
        sample, column, value = few
        row, column = torch.broadcast_tensors(idx[sample], column[:, None])
        where = torch.stack([row.flatten(), column.flatten()])
        values = weight[sample].to(wide) * value.to(wide)[:, None]
        values = (values if outside is None else values.masked_fill(outside[sample], 0)).flatten()
    return torch.sparse_coo_tensor(where, values.to(table.dtype), table.shape, check_invariants=False)


def _inside(idx: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
    """idx with 0 in place of what is out of 0..n-1, and where that was; None on a CPU, whose values were checked."""
    return (idx, None) if idx.is_cpu else _masked(idx, n)


def _masked(idx: Tensor, n: int) -> tuple[Tensor, Tensor]:
    outside = (idx < 0) | (idx >= n)
    return idx.masked_fill(outside, 0), outside


class SparseAttention(Function):
    """q, k, v (B, H, K, Dh), idx (B, K), strength values, gate (B, K), count (B,), each or None -> out, lse."""

    @staticmethod
    def forward(q, k, v, idx, strength, n, row_offsets, cols, search_steps, gate, count, scale, sparse_grad, backend):
        return op.sparse_attention(
            q, k, v, idx, strength, n, row_offsets, cols, search_steps, gate, count, scale, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        q, k, v, idx, strength, ctx.n, row_offsets, cols, ctx.search_steps, gate, count, *rest = inputs
        ctx.scale, ctx.sparse_grad, ctx.backend = rest
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, idx, strength, row_offsets, cols, gate, count, *output)

    @staticmethod
    def backward(ctx, grad_out: Tensor, _: Tensor):
        q, k, v, idx, strength, row_offsets, cols, gate, count, out, lse = ctx.saved_tensors
        layout = (ctx.n, row_offsets, cols, ctx.search_steps)
        grad_q, grad_k, grad_v, grad_bias, grad_gate = once(
            "sparse_attention_backward",
            grad_out,
            q,
            k,
            v,
            idx,
            strength,
            *layout,
            gate,
            count,
            ctx.scale,
            out,
            lse,
            ctx.backend,
        )
        grad_strength = None
        if ctx.needs_input_grad[4] and ctx.sparse_grad:
            grad_strength = _pairs_coo(grad_bias.to(strength.dtype), idx, count, ctx.n)
        elif ctx.needs_input_grad[4]:
            grad_strength = once("pair_gradient", grad_bias, idx, count, strength, *layout, ctx.backend)
        grad_gate = grad_gate if gate is not None and ctx.needs_input_grad[9] else None
        return grad_q, grad_k, grad_v, None, grad_strength, *(None,) * 4, grad_gate, *(None,) * 4


def _pairs_coo(grad_bias: Tensor, idx: Tensor, count: Tensor | None, n: int) -> Tensor:
    """The gradient of a dense strength as a sparse COO tensor; pairs that are not in use hold zeros at (0, 0)."""
    idx, outside = _inside(idx, n)
    if outside is not None:
        grad_bias = grad_bias.masked_fill(outside[:, :, None] | outside[:, None, :], 0)
    if count is not None:
        idx = torch.where(torch.arange(idx.shape[1], device=idx.device) < count[:, None], idx, 0)
    pre, post = torch.broadcast_tensors(idx[:, :, None], idx[:, None, :])
    index = torch.stack([pre.flatten(), post.flatten()])
    return torch.sparse_coo_tensor(index, grad_bias.flatten(), (n, n), check_invariants=False)


class SharedTable(Function):
    """Aliases of one table, one for each use; their gradients, of any layout, are summed into one strided tensor."""

    @staticmethod
    def forward(table: Tensor, uses: int) -> tuple[Tensor, ...]:
        return tuple(table.view_as(table) for _ in range(uses))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.options = inputs[0].shape, {"dtype": inputs[0].dtype, "device": inputs[0].device}

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        total = torch.zeros(ctx.shape, **ctx.options)
        for grad in grads:
            if grad is not None and grad.layout == torch.sparse_coo:
                where = tuple(grad._indices())
                _accumulate_(total, where, grad._values())
            elif grad is not None:
                total += grad
        return total, None


def _accumulate_(total: Tensor, where: tuple[Tensor, ...], values: Tensor) -> None:
    """total[where] += values with repeats, in a fixed order."""
    if not total.is_cpu:
        total.index_put_(where, values, accumulate=True)
    elif len(where) == 1:
        total.index_add_(0, where[0], values)
    else:
        total.view(-1).index_add_(0, where[0] * total.shape[1] + where[1], values)


def storage_args(storage: Storage) -> tuple[Tensor, int, Tensor | None, Tensor | None, int]:
    """A storage as the operators take it: values, n, row_offsets, cols, search_steps."""
    return storage.values, storage.n, storage.row_offsets, storage.cols, storage.search_steps
