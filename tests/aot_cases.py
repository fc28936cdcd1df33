"""The shipped shape classes: for each operation, the launches of its forward and backward pass on meta tensors.

Every value of each factor appears (dtype fp32, bf16, fp16; storage dense, block-sparse, per sample; K 64 to 300; Dh
32, 64, 128; N 4,096 to 1,048,576; gate, count; idx int32, int64), not every combination of them: all of it would take
hours to compile on two cores. N = 65,536 dense, the largest top-k and the large batches have tensors of 2**31 elements
and more: there addresses are checked for 32-bit products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from bio_kernels import _attention, _attention_backward, _pairs, _plasticity, _segment, _topk_gather, _weighted_rows
from bio_kernels._index import Storage
from torch import Tensor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_M = 1 << 20
_BLOCKS_PER_ROW = 64


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _storage(kind: str, n: int, dtype: torch.dtype) -> Storage | None:
    if kind == "none":
        return None
    if kind == "dense":
        return Storage(_new(n, n, dtype=dtype), n)
    p = int(kind.removeprefix("blocks"))
    offsets, cols = _new(n // p + 1, dtype=torch.int32), _new(n // p * _BLOCKS_PER_ROW, dtype=torch.int32)
    values = _new(n // p * _BLOCKS_PER_ROW, p, p, dtype=dtype)
    return Storage(values, n, offsets, cols, _BLOCKS_PER_ROW.bit_length())


def _table(kind: str, b: int, n: int, width: int, dtype: torch.dtype) -> Tensor | Storage:
    if kind.startswith("blocks"):
        return _storage(kind, n, dtype)
    return _new(b, n, width, dtype=dtype) if kind == "per-sample" else _new(n, width, dtype=dtype)


def _attention_case(dtype: str, bias: str, n: int, k: int, dh: int, flags: str) -> None:
    kind, b, h = _DTYPES[dtype], 32768 if "large-batch" in flags else 32, 4
    idx = _new(b, k, dtype=torch.int32 if "int32" in flags else torch.int64)
    storage = _storage(bias, n, torch.float32 if "fp32-bias" in flags else kind)
    gate = _new(b, k, dtype=kind) if "gate" in flags else None
    count = _new(b, dtype=torch.int32) if "count" in flags else None
    q, key, v, grad = (_new(b, h, k, dh, dtype=kind) for _ in range(4))
    scale = dh**-0.5
    out, lse = _attention.attention_forward(q, key, v, idx, storage, gate, count, scale)
    result = _attention_backward.attention_backward(grad, q, key, v, idx, storage, gate, count, scale, out, lse)
    if storage is not None:
        _pairs.pair_gradient(result[3], idx, count, storage)


def _plasticity_case(dtype: str, storage: str, n: int, k: int, flags: str) -> None:
    kind, b = _DTYPES[dtype], 32768 if "large-batch" in flags else 32
    idx = _new(b, k, dtype=torch.int32 if "int32" in flags else torch.int64)
    pre, post = _new(b, k, dtype=kind), _new(b, k, dtype=kind)
    bound = 1.0 if "bound" in flags else None
    _plasticity.update_strength(_storage(storage, n, kind), idx, pre, post, 0.01, 0.5, bound)


def _topk_case(dtype: str, table: str, b: int, n: int, k: int, d: int) -> None:
    kind = _DTYPES[dtype]
    rows = _table(table, b, n, d, kind)
    gate, idx, gathered = _topk_gather.topk_gather_forward(_new(b, n, dtype=kind), rows, k)
    _topk_gather.scatter_gate(gate, idx, n)
    _segment.segment_rows(idx, gathered, None, n, kind, table == "per-sample")


def _rows_case(dtype: str, table: str, b: int, n: int, k: int, m: int, flags: str) -> None:
    kind = _DTYPES[dtype]
    rows = _table(table, b, n, m, kind)
    idx = _new(b, k, dtype=torch.int32 if "int32" in flags else torch.int64)
    weight = _new(b, k, dtype=kind)
    out = _weighted_rows.weighted_rows_forward(rows, idx, weight)
    _weighted_rows.weighted_rows_backward_weight(rows, idx, out)
    _weighted_rows.weighted_rows_backward_table(rows, idx, weight, out)


_ATTENTION = [
    # dtype, bias, N, K, Dh, flags
    ("bf16", "dense", 4096, 128, 64, "gate"),
    ("bf16", "dense", 4096, 128, 32, "gate count"),
    ("bf16", "dense", 4096, 128, 128, "gate fp32-bias"),
    ("bf16", "dense", 4096, 256, 64, "gate large-batch"),
    ("bf16", "none", 4096, 64, 64, ""),
    ("bf16", "blocks32", _M, 128, 64, "gate"),
    ("bf16", "blocks32", 65536, 256, 128, "count"),
    ("bf16", "dense", 65536, 300, 128, "gate count int32"),
    ("fp32", "dense", 4096, 128, 32, "gate"),
    ("fp32", "dense", 65536, 64, 64, "int32"),
    ("fp32", "dense", 4096, 256, 64, "gate count"),
    ("fp32", "blocks32", 65536, 128, 128, "gate int32"),
    ("fp32", "none", 4096, 300, 128, "gate"),
    ("fp16", "dense", 4096, 256, 128, "gate"),
    ("fp16", "blocks32", _M, 300, 32, "int32"),
    ("bf16", "dense", 4096, 128, 256, "gate"),
    ("fp32", "dense", 4096, 128, 256, "gate count"),
]
_PLASTICITY = [
    # dtype, storage, N, K, flags
    ("fp32", "dense", 4096, 128, "bound"),
    ("fp32", "dense", 65536, 256, "int32"),
    ("fp32", "blocks32", _M, 128, "bound"),
    ("bf16", "dense", 4096, 128, "bound"),
    ("bf16", "dense", 65536, 300, "bound int32"),
    ("bf16", "blocks32", _M, 64, ""),
    ("fp16", "dense", 4096, 256, "large-batch"),
    ("bf16", "blocks128", 65536, 128, "bound"),
]
_TOPK = [
    # dtype, table, B, N, k, D
    ("fp32", "shared", 32, 4096, 128, 256),
    ("fp32", "per-sample", 32, 4096, 64, 128),
    ("bf16", "shared", 256, 4096, 128, 256),
    ("bf16", "shared", 32, 8192, 256, 256),
    ("fp16", "per-sample", 1, 1000, 300, 100),
    ("fp32", "shared", 1, 65536, 128, 256),
    ("bf16", "shared", 32, 65536, 256, 256),
    ("fp32", "shared", 32, 65536, 300, 256),
    ("fp32", "shared", 32, _M, 128, 256),
    ("bf16", "shared", 1, _M, 64, 64),
    ("fp32", "shared", 4096, _M, 128, 4096),
]
_ROWS = [
    # dtype, table, B, N, K, M, flags
    ("fp32", "shared", 32, 4096, 128, 4096, ""),
    ("fp32", "shared", 1, 4096, 128, 256, ""),
    ("fp32", "shared", 32, 65536, 256, 65536, "int32"),
    ("bf16", "shared", 256, 4096, 128, 256, ""),
    ("bf16", "shared", 32, 65536, 256, 65536, "int32"),
    ("bf16", "per-sample", 32, 4096, 64, 64, ""),
    ("fp16", "per-sample", 32, 300, 300, 100, ""),
    ("fp32", "blocks32", 32, 65536, 128, 65536, "int32"),
    ("bf16", "blocks32", 1, _M, 128, _M, ""),
    ("bf16", "blocks16", 32, 65536, 128, 65536, ""),
    ("fp32", "blocks128", 32, 65536, 256, 65536, ""),
    ("fp16", "shared", 32, 4096, 300, 128, ""),
]


def cases() -> dict[str, Callable[[], None]]:
    """Name -> a call that launches every kernel of one operation at one shape."""
    named: dict[str, Callable[[], None]] = {}
    for dtype, bias, n, k, dh, flags in _ATTENTION:
        label = f"attention {dtype} {bias} N={n} K={k} Dh={dh} {flags}".rstrip()
        named[label] = partial(_attention_case, dtype, bias, n, k, dh, flags)
    for dtype, storage, n, k, flags in _PLASTICITY:
        label = f"plasticity {dtype} {storage} N={n} K={k} {flags}".rstrip()
        named[label] = partial(_plasticity_case, dtype, storage, n, k, flags)
    for dtype, table, b, n, k, d in _TOPK:
        named[f"topk {dtype} {table} B={b} N={n} k={k} D={d}"] = partial(_topk_case, dtype, table, b, n, k, d)
    for dtype, table, b, n, k, m, flags in _ROWS:
        label = f"rows {dtype} {table} B={b} N={n} K={k} M={m} {flags}".rstrip()
        named[label] = partial(_rows_case, dtype, table, b, n, k, m, flags)
    return named
