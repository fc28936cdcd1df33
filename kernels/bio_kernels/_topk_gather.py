"""topk_gather: the k highest-scoring neurons of every sample, and their rows of a table.

gate (B, k) = score[idx], idx (B, k) ascending, rows (B, k, D) = table[idx]; score (B, N), table (N, D) or (B, N, D).
Selection is in _topk_select. Rows are fetched by the program that selected them while a sample's rows are few: one
multiprocessor moves 128 KiB in about the time of one more launch (estimate: 2 us). Otherwise program (b, tile) of a
second launch fetches one tile of slots.
Backward: the gradient of gate is scattered into zeros, program (b, tile) owning one tile of a row of scores; the
gradient of rows is _segment.segment_rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._topk_select import copy_rows, select

FUSED_BYTES = 128 * 1024  # rows of one sample up to which the selecting program fetches them
GATHER_TILE_BYTES = 32 * 1024  # in flight in a program of 8 warps: eight 128-bit loads a thread
UNALIGNED_TILE_BYTES = 8 * 1024  # rows that are no multiple of 16 bytes are loaded element by element: fewer at once
SCATTER_TILE = 4096


@triton.jit
def _gather_kernel(table_ptr, idx_ptr, rows_ptr, k, dim, table_stride, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_b = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    copy_rows(table_ptr + pid_b * table_stride, idx_ptr + pid_b * k, rows_ptr + pid_b * k * dim, slot, k, dim, BLOCK_D)


@triton.jit
def _scatter_kernel(grad_ptr, idx_ptr, out_ptr, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    pid_b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * BLOCK_N
    offs_n = first + tl.arange(0, BLOCK_N)
    out_ptr += pid_b * n
    tl.store(out_ptr + offs_n, tl.zeros((BLOCK_N,), out_ptr.dtype.element_ty), mask=offs_n < n)
    tl.debug_barrier()  # a zero and a gradient of the same address come from different threads
    for start in range(0, k, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        neuron = tl.load(idx_ptr + pid_b * k + slot, mask=slot < k, other=-1).to(tl.int64)
        grad = tl.load(grad_ptr + pid_b * k + slot, mask=slot < k)
        # idx is distinct within a sample, so no two threads write the same address
        tl.store(out_ptr + neuron, grad, mask=(neuron >= first) & (neuron < first + BLOCK_N) & (neuron < n))


def topk_gather_forward(score: Tensor, table: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """gate (B, k), idx (B, k) int64 ascending and rows (B, k, D) of the k highest of score (B, N).

    table: (N, D), or (B, N, D) for a table per sample. Raises RuntimeError if k > 4096 while N > 8192.
    """
    batch, n = score.shape
    dim = table.shape[-1]
    rows = torch.empty((batch, k, dim), dtype=table.dtype, device=table.device)
    if batch == 0:
        return score.new_empty((0, k)), score.new_empty((0, k), dtype=torch.int64), rows
    block_d = min(triton.next_power_of_2(max(dim, 16)), 512)
    tile = UNALIGNED_TILE_BYTES if dim * table.element_size() % 16 else GATHER_TILE_BYTES
    block_k = min(triton.next_power_of_2(k), tile // (block_d * table.element_size()))
    fetch = dict(
        table_ptr=table, rows_ptr=rows, dim=dim, table_stride=n * dim if table.dim() == 3 else 0,
        BLOCK_K=block_k, BLOCK_D=block_d,
    )  # fmt: skip
    if k * dim * table.element_size() <= FUSED_BYTES:
        return *select(score, k, fetch), rows
    gate, idx = select(score, k)
    _gather_kernel[(batch, triton.cdiv(k, block_k))](idx_ptr=idx, k=k, num_warps=8, **fetch)
    return gate, idx, rows


def scatter_gate(grad_gate: Tensor, idx: Tensor, n: int) -> Tensor:
    """grad_score (B, n): grad_gate (B, k) at idx (B, k), distinct within a sample, and 0 elsewhere."""
    batch, k = idx.shape
    out = torch.empty((batch, n), dtype=grad_gate.dtype, device=grad_gate.device)
    if batch == 0:
        return out
    block_n = min(triton.next_power_of_2(n), SCATTER_TILE)
    _scatter_kernel[(batch, triton.cdiv(n, block_n))](
        grad_ptr=grad_gate, idx_ptr=idx, out_ptr=out, n=n, k=k,
        BLOCK_N=block_n, BLOCK_K=min(triton.next_power_of_2(k), 1024), num_warps=4,
    )  # fmt: skip
    return out
