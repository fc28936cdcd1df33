"""Sums of rows that share a neuron: out[i] = sum over the entries e with idx_e = i of weight_e * values_e.

Layouts: idx (B, K), weight (B, K) or None (all 1), values (B, K, D) or (B, D) (one row for all slots of a sample);
out (n, D), or (B, n, D) where every sample has a table of its own. This is the gradient of every gather from a table.

Entries are walked through the inverted index (see _index), sorted by neuron. Program (p, tile) looks at sorted position
p and works only if a run of equal neurons starts there; it then owns that row's tile, sums the run in sorted order in
float32 and rounds once. No two programs write the same address and no atomics are used, so the bits are reproducible,
and the grid is B * K programs, never n. Rows that no entry names are zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _index

RUN_BLOCK = 8  # entries summed at once: an average run of B * K = 32k entries over N = 4096 neurons is 8 long
TILE = 2048  # elements in flight a program, RUN_BLOCK x BLOCK_D: small programs, because most of them only exit


@triton.jit
def run_start(neuron_ptr, p, n):
    """The neuron at sorted position p, and whether a run of a valid neuron starts there."""
    neuron = tl.load(neuron_ptr + p)
    before = tl.load(neuron_ptr + p - 1, mask=p > 0, other=-1)
    return neuron, (neuron != before) & (neuron < n)


@triton.jit
def sum_run(
    neuron_ptr, entry_ptr, weight_ptr, values_ptr, p, total, slots, dim, column, mask,
    HAS_WEIGHT: tl.constexpr, PER_SLOT: tl.constexpr, RUN_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of weight * values[row, column] over the run that starts at p; column and mask (BLOCK_D,) -> (BLOCK_D,)."""
    neuron = tl.load(neuron_ptr + p)
    offs_e = p + tl.arange(0, RUN_BLOCK)
    inside = tl.load(neuron_ptr + offs_e, mask=offs_e < total, other=-1) == neuron
    acc = tl.zeros((RUN_BLOCK, BLOCK_D), tl.float32)
    while tl.max(inside.to(tl.int32)) > 0:
        entry = tl.load(entry_ptr + offs_e, mask=inside, other=0).to(tl.int64)
        row = entry if PER_SLOT else entry // slots
        x = tl.load(values_ptr + row[:, None] * dim + column[None, :], mask=inside[:, None] & mask[None, :], other=0.0)
        x = x.to(tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + entry, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside[:, None], weight[:, None] * x, 0.0)
        acc += x
        offs_e += RUN_BLOCK
        inside = tl.load(neuron_ptr + offs_e, mask=offs_e < total, other=-1) == neuron
    return tl.sum(acc, axis=0)


@triton.jit
def _segment_rows_kernel(
    neuron_ptr, entry_ptr, weight_ptr, values_ptr, out_ptr, total, n, slots, dim,
    HAS_WEIGHT: tl.constexpr, PER_SLOT: tl.constexpr, RUN_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    neuron, owner = run_start(neuron_ptr, p, n)
    if owner:
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < dim
        acc = sum_run(
            neuron_ptr, entry_ptr, weight_ptr, values_ptr, p, total, slots, dim, offs_d, mask_d,
            HAS_WEIGHT, PER_SLOT, RUN_BLOCK, BLOCK_D,
        )  # fmt: skip
        # one owner per (neuron, tile): no other program writes here
        tl.store(out_ptr + neuron.to(tl.int64) * dim + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)


def sorted_entries(idx: Tensor, n: int, per_sample: bool) -> tuple[_index.InvertedIndex, int]:
    """Inverted index of idx (B, K) and its number of keys: n, or B * n where every sample has a table of its own."""
    if not per_sample:
        return _index.inverted(idx, n), n
    first = torch.arange(idx.shape[0], device=idx.device)[:, None] * n
    shifted = torch.where((idx >= 0) & (idx < n), idx + first, -1)
    return _index.invert(shifted, idx.shape[0] * n), idx.shape[0] * n


def run_warps(block_d: int) -> int:
    """Warps of a program that sums runs: 16 elements a thread, so that a short-lived program is a small one."""
    return max(1, min(4, RUN_BLOCK * block_d // 512))


def segment_rows(
    idx: Tensor, values: Tensor, weight: Tensor | None, n: int, dtype: torch.dtype, per_sample: bool
) -> Tensor:
    """out[i] = sum of weight_e * values_e over the entries e of idx (B, K) with idx_e = i.

    idx: (B, K) int32 or int64; entries outside 0..n-1 are left out.
    values: (B, K, D), or (B, D): the same row for every slot of a sample. weight: (B, K), or None for all 1.
    Returns (n, D), or (B, n, D) if per_sample, of ``dtype``; summed in float32 in a fixed order and rounded once.
    """
    batch, slots = idx.shape
    dim = values.shape[-1]
    out = torch.zeros((batch, n, dim) if per_sample else (n, dim), dtype=dtype, device=values.device)
    if idx.numel() == 0 or out.numel() == 0:
        return out
    entries, keys = sorted_entries(idx, n, per_sample)
    block_d = min(triton.next_power_of_2(dim), TILE // RUN_BLOCK)
    _segment_rows_kernel[(idx.numel(), triton.cdiv(dim, block_d))](
        neuron_ptr=entries.neuron, entry_ptr=entries.entry, weight_ptr=values if weight is None else weight,
        values_ptr=values, out_ptr=out, total=idx.numel(), n=keys, slots=slots, dim=dim,
        HAS_WEIGHT=weight is not None, PER_SLOT=values.dim() == 3, RUN_BLOCK=RUN_BLOCK, BLOCK_D=block_d,
        num_warps=run_warps(block_d),
    )  # fmt: skip
    return out
