"""The opaque operators (torch.library) that tie the plain-torch reference and the Triton launchers to one op each.

Every operator takes the backend's name ("reference" or "triton", already resolved) and calls the function of the same
name there; a kernel file, and with it Triton, is imported only then. Values are checked here, where they exist. None of
them has a derivative: that is the business of ``_autograd``.
"""

# No `from __future__ import annotations`: torch reads the schemas from the annotations themselves.
import importlib
from functools import partial
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

from . import _checks, reference, reference_pairs
from ._index import Storage
from ._operator import Operator


def _rows(backend: str, file: str) -> ModuleType:
    """The kernel file, or the reference, of an operation on rows of a table."""
    return importlib.import_module(f"{__package__}.{file}") if backend == "triton" else reference


def _pairs(backend: str, file: str) -> ModuleType:
    """The kernel file, or the reference, of an operation on pairs of neurons."""
    return importlib.import_module(f"{__package__}.{file}") if backend == "triton" else reference_pairs


def _storage(
    values: Tensor, n: int, row_offsets: Optional[Tensor], cols: Optional[Tensor], search_steps: int
) -> Storage:
    return Storage(values.contiguous(), n, row_offsets, cols, search_steps)


def _contiguous(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else x.contiguous()


def _table(
    table: Tensor, n: int, row_offsets: Optional[Tensor], cols: Optional[Tensor], search_steps: int
) -> Tensor | Storage:
    return table.contiguous() if row_offsets is None else _storage(table, n, row_offsets, cols, search_steps)


@Operator
def topk_gather(score: Tensor, table: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    _checks.finite(score=score)
    if score.shape[0] == 0:
        return score.new_empty(0, k), score.new_empty(0, k, dtype=torch.int64), table.new_empty(0, k, table.shape[-1])
    return _rows(backend, "_topk_gather").topk_gather_forward(score.contiguous(), table.contiguous(), k)


@topk_gather.register_fake
def _(score: Tensor, table: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    batch = score.shape[0]
    idx = score.new_empty(batch, k, dtype=torch.int64)
    return score.new_empty(batch, k), idx, table.new_empty(batch, k, table.shape[-1])


@Operator
def scatter_gate(grad_gate: Tensor, idx: Tensor, n: int, backend: str) -> Tensor:
    return _rows(backend, "_topk_gather").scatter_gate(grad_gate.contiguous(), idx, n)


@scatter_gate.register_fake
def _(grad_gate: Tensor, idx: Tensor, n: int, backend: str) -> Tensor:
    return grad_gate.new_empty(idx.shape[0], n)


@Operator
def segment_rows(idx: Tensor, values: Tensor, n: int, dtype: torch.dtype, per_sample: bool, backend: str) -> Tensor:
    return _rows(backend, "_segment").segment_rows(idx, values.contiguous(), None, n, dtype, per_sample)


@segment_rows.register_fake
def _(idx: Tensor, values: Tensor, n: int, dtype: torch.dtype, per_sample: bool, backend: str) -> Tensor:
    shape = (idx.shape[0], n, values.shape[-1]) if per_sample else (n, values.shape[-1])
    return values.new_empty(shape, dtype=dtype)


@Operator
def weighted_rows(
    table: Tensor,
    n: int,
    row_offsets: Optional[Tensor],
    cols: Optional[Tensor],
    search_steps: int,
    idx: Tensor,
    weight: Tensor,
    backend: str,
) -> Tensor:
    _checks.indices(idx, n)
    _checks.finite(weight=weight)
    source = _table(table, n, row_offsets, cols, search_steps)
    return _rows(backend, "_weighted_rows").weighted_rows_forward(source, idx.contiguous(), weight.contiguous())


@weighted_rows.register_fake
def _(table, n, row_offsets, cols, search_steps, idx, weight, backend):
    return table.new_empty(idx.shape[0], table.shape[-1] if row_offsets is None else n)


@Operator
def weighted_rows_backward_weight(
    table: Tensor,
    n: int,
    row_offsets: Optional[Tensor],
    cols: Optional[Tensor],
    search_steps: int,
    idx: Tensor,
    weight: Tensor,
    grad_out: Tensor,
    backend: str,
) -> Tensor:
    source = _table(table, n, row_offsets, cols, search_steps)
    impl = _rows(backend, "_weighted_rows")
    return impl.weighted_rows_backward_weight(source, idx.contiguous(), grad_out.contiguous()).to(weight.dtype)


@weighted_rows_backward_weight.register_fake
def _(table, n, row_offsets, cols, search_steps, idx, weight, grad_out, backend):
    return weight.new_empty(weight.shape)


@Operator
def weighted_rows_backward_table(
    table: Tensor,
    n: int,
    row_offsets: Optional[Tensor],
    cols: Optional[Tensor],
    search_steps: int,
    idx: Tensor,
    weight: Tensor,
    grad_out: Tensor,
    backend: str,
) -> Tensor:
    source = _table(table, n, row_offsets, cols, search_steps)
    impl = _rows(backend, "_weighted_rows")
    return impl.weighted_rows_backward_table(source, idx.contiguous(), weight.contiguous(), grad_out.contiguous())


@weighted_rows_backward_table.register_fake
def _(table, n, row_offsets, cols, search_steps, idx, weight, grad_out, backend):
    return table.new_empty(table.shape)


@Operator
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    strength: Optional[Tensor],
    n: int,
    row_offsets: Optional[Tensor],
    cols: Optional[Tensor],
    search_steps: int,
    gate: Optional[Tensor],
    count: Optional[Tensor],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _checks.indices(idx, n, count, distinct=True)
    if gate is not None:
        _checks.gates(gate, count)
    _checks.finite(q=q, k=k, v=v)
    storage = None if strength is None else _storage(strength, n, row_offsets, cols, search_steps)
    impl = _pairs(backend, "_attention")
    q, k, v, idx = (x.contiguous() for x in (q, k, v, idx))
    return impl.attention_forward(q, k, v, idx, storage, _contiguous(gate), _contiguous(count), scale)


@sparse_attention.register_fake
def _(q, k, v, idx, strength, n, row_offsets, cols, search_steps, gate, count, scale, backend):
    wide = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=wide)


@Operator
def sparse_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    strength: Optional[Tensor],
    n: int,
    row_offsets: Optional[Tensor],
    cols: Optional[Tensor],
    search_steps: int,
    gate: Optional[Tensor],
    count: Optional[Tensor],
    scale: float,
    out: Tensor,
    lse: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, of the bias (B, K pre, K post) and of the gate; an empty tensor where there is none."""
    storage = None if strength is None else _storage(strength, n, row_offsets, cols, search_steps)
    gates, count = _contiguous(gate), _contiguous(count)
    impl = _pairs(backend, "_attention_backward")
    grad_out, q, k, v, idx = (x.contiguous() for x in (grad_out, q, k, v, idx))
    *grads, grad_bias, grad_gate = impl.attention_backward(
        grad_out, q, k, v, idx, storage, gates, count, scale, out, lse
    )
    bias = lse.new_empty(0) if grad_bias is None else grad_bias
    return *grads, bias, lse.new_empty(0) if gate is None else grad_gate.to(gate.dtype)


@sparse_attention_backward.register_fake
def _(grad_out, q, k, v, idx, strength, n, row_offsets, cols, search_steps, gate, count, scale, out, lse, backend):
    slots = q.shape[2]
    bias = lse.new_empty(0 if strength is None else (q.shape[0], slots, slots))
    grad_gate = lse.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias, grad_gate


@Operator
def pair_gradient(
    delta: Tensor,
    idx: Tensor,
    count: Optional[Tensor],
    strength: Tensor,
    n: int,
    row_offsets: Optional[Tensor],
    cols: Optional[Tensor],
    search_steps: int,
    backend: str,
) -> Tensor:
    storage = Storage(strength, n, row_offsets, cols, search_steps)
    return _pairs(backend, "_pairs").pair_gradient(delta.contiguous(), idx.contiguous(), _contiguous(count), storage)


@pair_gradient.register_fake
def _(delta, idx, count, strength, n, row_offsets, cols, search_steps, backend):
    return strength.new_empty(strength.shape)


@partial(Operator, mutates=("strength",))
def update_strength_(
    strength: Tensor,
    n: int,
    row_offsets: Optional[Tensor],
    cols: Optional[Tensor],
    search_steps: int,
    idx: Tensor,
    pre: Tensor,
    post: Tensor,
    eta: float,
    decay: float,
    bound: Optional[float],
    count: Optional[Tensor],
    backend: str,
) -> None:
    _checks.indices(idx, n, count, distinct=True)
    _checks.finite(pre=pre, post=post)
    if idx.shape[0] == 0:
        return
    storage = _storage(strength, n, row_offsets, cols, search_steps)
    impl = _pairs(backend, "_plasticity")
    idx, pre, post = idx.contiguous(), pre.contiguous(), post.contiguous()
    impl.update_strength(storage, idx, pre, post, eta, decay, bound, _contiguous(count))
    if storage.values.data_ptr() != strength.data_ptr():  # strided: a copy was updated
        strength.copy_(storage.values)
    torch.autograd.graph.increment_version(strength)  # below autograd, and in a kernel, nobody else does


@update_strength_.register_fake
def _(strength, n, row_offsets, cols, search_steps, idx, pre, post, eta, decay, bound, count, backend):
    return None
