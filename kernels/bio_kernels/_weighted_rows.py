"""weighted_rows: out_b = sum_j weight[b, j] * table[idx[b, j]], a weighted bag of rows.

Layouts: idx, weight (B, K); out, grad_out (B, M). table: dense (N, M) or (B, N, M), or a block-sparse Storage, M = N.
Dense forward: program (b, tile) owns a tile of out_b and adds K rows in chunks. Block-sparse forward: program
(b, group) owns GROUP block columns of out_b; for a chunk of active neurons it finds each one's first stored block in
the group by binary search, then steps all of them from block to block, sending each block's row to its place in the
group by a matrix product with the weights. Blocks that are not stored are not read; stored values that are not finite
are added outside the product, where 0 * inf would spread.
Backward: the gradient of weight is the dot of a row with grad_out_b, program (b, chunk of slots), or (b, slot) if
block-sparse; the table's gradient is summed by one owner per neuron along the inverted index (see _segment).
Accumulation is float32 in a fixed order, rounded once, without atomics. An index outside 0 .. N - 1 adds nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _segment, _storage
from ._index import Storage

TILE = 8192  # elements in flight in a program of 8 warps: four (16-bit) or eight (32-bit) loads of 128 bits a thread
# Block columns of a block-sparse output that one program owns (and the most neurons it handles at once), and elements
# of their rows it fetches at once. 64 is the height of one warpgroup's tensor-core tile; twice the elements spilled
# (float32; Triton 3.6 and 3.7), and these figures spilled more on sm_80, whose operands of a product stay in registers.
SPARSE = {"sm_90": (64, 1024), "sm_100": (64, 2048), "sm_103": (64, 2048)}
SPARSE_OTHER = (32, 2048)
SPAN = 2048  # elements of a block-sparse row taken at once: 64 blocks of 32


@triton.jit
def _dense_forward_kernel(
    table_ptr, idx_ptr, weight_ptr, out_ptr, n, slots, dim, table_stride, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr
):
    pid_b = tl.program_id(0).to(tl.int64)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < dim
    table_ptr += pid_b * table_stride
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for start in range(0, slots, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        neuron = tl.load(idx_ptr + pid_b * slots + slot, mask=slot < slots, other=-1).to(tl.int64)
        weight = tl.load(weight_ptr + pid_b * slots + slot, mask=slot < slots, other=0.0).to(tl.float32)
        valid = (neuron >= 0) & (neuron < n)
        mask = valid[:, None] & mask_m[None, :]
        x = tl.load(table_ptr + neuron[:, None] * dim + offs_m[None, :], mask=mask, other=0.0)  # (BLOCK_K, BLOCK_M)
        acc += tl.where(valid, weight, 0.0)[:, None] * x.to(tl.float32)
    out = tl.sum(acc, axis=0)
    tl.store(out_ptr + pid_b * dim + offs_m, out.to(out_ptr.dtype.element_ty), mask=mask_m)


@triton.jit
def _dense_weight_kernel(
    table_ptr, idx_ptr, grad_ptr, out_ptr, n, slots, dim, table_stride, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr
):
    pid_b = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    table_ptr += pid_b * table_stride
    neuron = tl.load(idx_ptr + pid_b * slots + slot, mask=slot < slots, other=-1).to(tl.int64)
    valid = (neuron >= 0) & (neuron < n)
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for start in range(0, dim, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < dim
        mask = valid[:, None] & mask_m[None, :]
        x = tl.load(table_ptr + neuron[:, None] * dim + offs_m[None, :], mask=mask, other=0.0)  # (BLOCK_K, BLOCK_M)
        grad = tl.load(grad_ptr + pid_b * dim + offs_m, mask=mask_m, other=0.0).to(tl.float32)
        acc += tl.where(valid[:, None], x.to(tl.float32) * grad[None, :], 0.0)
    tl.store(out_ptr + pid_b * slots + slot, tl.sum(acc, axis=1), mask=slot < slots)


@triton.jit
def _first_block(row_offsets_ptr, cols_ptr, row, col, valid, SEARCH_STEPS: tl.constexpr):
    """(first stored block of block row `row` whose column is >= col, end of the row); (0, 0) where not valid."""
    low = tl.load(row_offsets_ptr + row, mask=valid, other=0).to(tl.int64)
    end = tl.load(row_offsets_ptr + row + 1, mask=valid, other=0).to(tl.int64)
    high = end
    for _ in tl.static_range(SEARCH_STEPS):
        mid = (low + high) // 2
        less = (low < high) & (tl.load(cols_ptr + mid, mask=low < high, other=0) < col)
        high = tl.where(less, high, tl.where(low < high, mid, high))
        low = tl.where(less, mid + 1, low)
    return low, end


@triton.jit
def _add_not_finite(acc, x, finite, weight, place, inside, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc (GROUP, P) plus the values of rows x (BLOCK_K, P) that are not finite, each in its own place only."""
    offs_k = tl.arange(0, BLOCK_K)
    offs_g = tl.arange(0, GROUP)
    for j in range(BLOCK_K):
        mine = (offs_k == j) & inside
        row = tl.sum(tl.where(mine[:, None] & (finite == 0), x, 0.0), axis=0)  # (P,)
        there = offs_g == tl.sum(tl.where(mine, place, 0), axis=0)
        w = tl.sum(tl.where(mine, weight.to(tl.float32), 0.0), axis=0)
        acc += tl.where(there[:, None] & (row != 0.0)[None, :], w * row[None, :], 0.0)
    return acc


@triton.jit
def _sparse_forward_kernel(
    values_ptr, row_offsets_ptr, cols_ptr, idx_ptr, weight_ptr, out_ptr, n, slots,
    P: tl.constexpr, SEARCH_STEPS: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * GROUP
    offs_g = tl.arange(0, GROUP)
    offs_p = tl.arange(0, P)
    acc = tl.zeros((GROUP, P), tl.float32)
    for start in range(0, slots, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        neuron = tl.load(idx_ptr + pid_b * slots + slot, mask=slot < slots, other=-1)
        weight = tl.load(weight_ptr + pid_b * slots + slot, mask=slot < slots, other=0.0)
        valid = (neuron >= 0) & (neuron < n)
        block, end = _first_block(row_offsets_ptr, cols_ptr, neuron // P, first, valid, SEARCH_STEPS)
        place = tl.load(cols_ptr + block, mask=block < end, other=0) - first
        inside = (block < end) & (place < GROUP)
        while tl.max(inside.to(tl.int32)) > 0:  # each neuron sends its next block, if that is still in the group
            offset = block * (P * P) + (neuron % P).to(tl.int64) * P
            x = tl.load(values_ptr + offset[:, None] + offs_p[None, :], mask=inside[:, None], other=0.0)  # (BLOCK_K, P)
            send = tl.where(inside[None, :] & (place[None, :] == offs_g[:, None]), weight[None, :], 0.0)
            wide = x.to(tl.float32)
            finite = wide - wide == 0.0
            if HALF:
                acc = tl.dot(send.to(x.dtype), tl.where(finite, x, 0.0), acc)
            else:
                acc = tl.dot(send.to(tl.float32), tl.where(finite, wide, 0.0), acc, input_precision=PRECISION)
            if tl.min(finite.to(tl.int32)) == 0:  # rare: in the product 0 * inf would reach every column of the group
                acc = _add_not_finite(acc, wide, finite, weight, place, inside, GROUP, BLOCK_K)
            block += inside.to(tl.int64)
            place = tl.load(cols_ptr + block, mask=block < end, other=0) - first
            inside = inside & (block < end) & (place < GROUP)
    offs = (first + offs_g)[:, None] * P + offs_p[None, :]
    tl.store(out_ptr + pid_b * n + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _sparse_weight_kernel(
    values_ptr, row_offsets_ptr, cols_ptr, idx_ptr, grad_ptr, out_ptr, n, slots, P: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0)  # one dimension: the others end at 65,535
    pid_b = (pid // slots).to(tl.int64)
    neuron = tl.load(idx_ptr + pid).to(tl.int64)
    valid = (neuron >= 0) & (neuron < n)
    begin = tl.load(row_offsets_ptr + neuron // P, mask=valid, other=0).to(tl.int64)
    end = tl.load(row_offsets_ptr + neuron // P + 1, mask=valid, other=0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK // P):
        block = (start + offs // P).to(tl.int64)
        col = tl.load(cols_ptr + block, mask=block < end, other=0).to(tl.int64)
        x = tl.load(values_ptr + block * (P * P) + (neuron % P) * P + offs % P, mask=block < end, other=0.0)
        grad = tl.load(grad_ptr + pid_b * n + col * P + offs % P, mask=block < end, other=0.0)
        acc += x.to(tl.float32) * grad.to(tl.float32)
    tl.store(out_ptr + pid, tl.sum(acc, axis=0))


@triton.jit
def _sparse_table_kernel(
    neuron_ptr, entry_ptr, row_offsets_ptr, cols_ptr, weight_ptr, grad_ptr, out_ptr, total, n, slots,
    P: tl.constexpr, RUN_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    key, owner = _segment.run_start(neuron_ptr, p, n)
    if owner:
        neuron = key.to(tl.int64)
        offs = tl.arange(0, BLOCK)
        block = tl.load(row_offsets_ptr + neuron // P) + tl.program_id(1).to(tl.int64) * (BLOCK // P) + offs // P
        mask = block < tl.load(row_offsets_ptr + neuron // P + 1)
        column = tl.load(cols_ptr + block, mask=mask, other=0).to(tl.int64) * P + offs % P
        acc = _segment.sum_run(
            neuron_ptr, entry_ptr, weight_ptr, grad_ptr, p, total, slots, n, column, mask, True, False, RUN_BLOCK, BLOCK
        )
        # one owner per (neuron, blocks): no other program writes here
        target = block * (P * P) + (neuron % P) * P + offs % P
        tl.store(out_ptr + target, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _forward_tile(batch: int, slots: int, dim: int) -> tuple[int, int]:
    """(BLOCK_K, BLOCK_M): wide tiles read longer rows; narrow ones keep few samples from leaving the GPU idle."""
    wide = dim >= 256 and batch * triton.cdiv(dim, 256) >= 2 * 132
    block_m = min(triton.next_power_of_2(dim), 256 if wide else 64)
    return min(triton.next_power_of_2(slots), TILE // block_m), block_m


def weighted_rows_forward(table: Tensor | Storage, idx: Tensor, weight: Tensor) -> Tensor:
    """out (B, M) of table's dtype: out_b = sum_j weight[b, j] * table[idx[b, j]]; table (N, M), (B, N, M) or sparse."""
    batch, slots = idx.shape
    if isinstance(table, Storage):
        return _sparse_forward(table, idx, weight)
    n, dim = table.shape[-2:]
    out = torch.empty((batch, dim), dtype=table.dtype, device=table.device)
    if out.numel() == 0:
        return out
    block_k, block_m = _forward_tile(batch, slots, dim)
    _dense_forward_kernel[(batch, triton.cdiv(dim, block_m))](
        table_ptr=table, idx_ptr=idx, weight_ptr=weight, out_ptr=out, n=n, slots=slots, dim=dim,
        table_stride=n * dim if table.dim() == 3 else 0, BLOCK_K=block_k, BLOCK_M=block_m, num_warps=8,
    )  # fmt: skip
    return out


def _sparse_forward(storage: Storage, idx: Tensor, weight: Tensor) -> Tensor:
    batch, slots = idx.shape
    values, n, p = storage.values, storage.n, storage.block_size
    out = torch.empty((batch, n), dtype=values.dtype, device=values.device)
    if batch == 0:
        return out
    arch = _storage.arch_of(values)
    group, tile = SPARSE.get(arch, SPARSE_OTHER)
    precision = "tf32x3" if arch.startswith("sm_") else "ieee"
    _sparse_forward_kernel[(batch, triton.cdiv(n, group * p))](
        values_ptr=values, row_offsets_ptr=storage.row_offsets, cols_ptr=storage.cols, idx_ptr=idx, weight_ptr=weight,
        out_ptr=out, n=n, slots=slots, P=p, SEARCH_STEPS=storage.search_steps,
        HALF=values.dtype == weight.dtype != torch.float32, PRECISION=precision,
        GROUP=group, BLOCK_K=max(16, min(group, tile // p)), num_warps=4,
    )  # fmt: skip
    return out


def weighted_rows_backward_weight(table: Tensor | Storage, idx: Tensor, grad_out: Tensor) -> Tensor:
    """grad_weight (B, K) float32: the dot of row table[idx[b, j]] with grad_out[b] (B, M)."""
    batch, slots = idx.shape
    out = torch.empty((batch, slots), dtype=torch.float32, device=idx.device)
    if out.numel() == 0:
        return out
    if isinstance(table, Storage):
        p = table.block_size
        block = min(p * triton.next_power_of_2(max(1, 2**table.search_steps - 1)), SPAN)
        _sparse_weight_kernel[(batch * slots,)](
            values_ptr=table.values, row_offsets_ptr=table.row_offsets, cols_ptr=table.cols, idx_ptr=idx,
            grad_ptr=grad_out, out_ptr=out, n=table.n, slots=slots, P=p, BLOCK=block, num_warps=2,
        )  # fmt: skip
        return out
    n, dim = table.shape[-2:]
    block_m = min(triton.next_power_of_2(max(dim, 1)), SPAN)
    block_k = min(triton.next_power_of_2(slots), max(1, TILE // block_m))
    _dense_weight_kernel[(batch, triton.cdiv(slots, block_k))](
        table_ptr=table, idx_ptr=idx, grad_ptr=grad_out, out_ptr=out, n=n, slots=slots, dim=dim,
        table_stride=n * dim if table.dim() == 3 else 0, BLOCK_K=block_k, BLOCK_M=block_m, num_warps=8,
    )  # fmt: skip
    return out


def weighted_rows_backward_table(table: Tensor | Storage, idx: Tensor, weight: Tensor, grad_out: Tensor) -> Tensor:
    """Gradient of table's values (a Storage: of its blocks), in their dtype; zero where no active neuron reaches."""
    if not isinstance(table, Storage):
        return _segment.segment_rows(idx, grad_out, weight, table.shape[-2], table.dtype, table.dim() == 3)
    p = table.block_size
    out = torch.zeros_like(table.values)
    if idx.numel() == 0 or out.numel() == 0:
        return out
    longest = 2**table.search_steps - 1  # a block row holds no more than this
    block = min(p * triton.next_power_of_2(longest), _segment.TILE // _segment.RUN_BLOCK)
    entries, _ = _segment.sorted_entries(idx, table.n, per_sample=False)
    _sparse_table_kernel[(idx.numel(), triton.cdiv(longest * p, block))](
        neuron_ptr=entries.neuron, entry_ptr=entries.entry, row_offsets_ptr=table.row_offsets, cols_ptr=table.cols,
        weight_ptr=weight, grad_ptr=grad_out, out_ptr=out, total=idx.numel(), n=table.n, slots=idx.shape[1],
        P=p, RUN_BLOCK=_segment.RUN_BLOCK, BLOCK=block, num_warps=_segment.run_warps(block),
    )  # fmt: skip
    return out
