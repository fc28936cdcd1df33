"""Kernels that might replace ours, tried in the tuning steps and nowhere else.

radix_select: the k highest of a row of at most 8192 scores by digits of 8 bits, a histogram each, where ours divides
the range of keys by three. atomic_add_pairs: every pair adds its change by itself, in any order, where ours has one
program own a row; atomic_sum_rows: the same of whole rows, by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import FILES

_sortable = FILES["select"]._sortable
LARGEST = 8192  # scores of a row: one program holds them


@triton.jit
def _radix_kernel(score_ptr, gate_ptr, idx_ptr, n, k, BITS: tl.constexpr, BLOCK_N: tl.constexpr):
    pid_b = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    x = tl.load(score_ptr + pid_b * n + offs_n, mask=mask_n, other=0.0)  # (BLOCK_N,)
    key = tl.where(mask_n, _sortable(x), 0)
    offs_d = tl.arange(0, 256)
    threshold = tl.full((), 0, tl.uint32)  # the digits of the k-th key, from the highest on
    need = k  # how many keys that begin with those digits are selected
    for place in tl.static_range(BITS // 8):
        shift = BITS - 8 * (place + 1)
        if place == 0:
            alike = mask_n
        else:
            alike = mask_n & ((key >> (shift + 8)) == (threshold >> (shift + 8)))
        digit = ((key >> shift) & 255).to(tl.int32)
        count = tl.histogram(digit, 256, mask=alike)
        upto = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # keys with this digit or a higher one
        chosen = tl.sum((upto >= need).to(tl.int32), 0) - 1
        need -= tl.sum(tl.where(offs_d > chosen, count, 0), 0)
        threshold |= chosen.to(tl.uint32) << shift
    equal = mask_n & (key == threshold)
    equal_upto = tl.cumsum(equal.to(tl.int32), 0)
    selected = (key > threshold) | (equal & (equal_upto <= need))
    slot = tl.cumsum(selected.to(tl.int32), 0) - 1
    tl.store(idx_ptr + pid_b * k + slot, offs_n.to(tl.int64), mask=selected)  # slots are distinct: one writer each
    tl.store(gate_ptr + pid_b * k + slot, x, mask=selected)


def radix_select(score: Tensor, k: int, warps: int = 8) -> tuple[Tensor, Tensor]:
    """gate (B, k) and idx (B, k) int64, ascending, of the k highest of score (B, N), N <= LARGEST."""
    batch, n = score.shape
    gate = torch.empty(batch, k, dtype=score.dtype, device=score.device)
    idx = torch.empty(batch, k, dtype=torch.int64, device=score.device)
    _radix_kernel[(batch,)](
        score,
        gate,
        idx,
        n,
        k,
        BITS=8 * score.element_size(),
        BLOCK_N=max(256, triton.next_power_of_2(n)),
        num_warps=warps,
    )
    return gate, idx


@triton.jit
def _atomic_pairs_kernel(delta_ptr, idx_ptr, values_ptr, n, k, BLOCK_PRE: tl.constexpr, BLOCK_POST: tl.constexpr):
    tiles = tl.cdiv(k, BLOCK_POST)
    pid_b = tl.program_id(0).to(tl.int64)
    offs_pre = (tl.program_id(1) // tiles) * BLOCK_PRE + tl.arange(0, BLOCK_PRE)
    offs_post = (tl.program_id(1) % tiles) * BLOCK_POST + tl.arange(0, BLOCK_POST)
    pre = tl.load(idx_ptr + pid_b * k + offs_pre, mask=offs_pre < k, other=0).to(tl.int64)
    post = tl.load(idx_ptr + pid_b * k + offs_post, mask=offs_post < k, other=0).to(tl.int64)
    inside = (offs_pre < k)[:, None] & (offs_post < k)[None, :]
    pair = (pid_b * k + offs_pre[:, None]) * k + offs_post[None, :]
    delta = tl.load(delta_ptr + pair, mask=inside, other=0.0)  # (BLOCK_PRE, BLOCK_POST)
    # Writes: atomics, so the order of the sum is not fixed.
    tl.atomic_add(values_ptr + pre[:, None] * n + post[None, :], delta, mask=inside, sem="relaxed")


def atomic_add_pairs(matrix: Tensor, delta: Tensor, idx: Tensor) -> None:
    """matrix (N, N) float32 [idx_bj, idx_bi] += delta[b, j, i], in place; not deterministic."""
    batch, k = idx.shape
    pre, post = 8, min(128, triton.next_power_of_2(k))
    grid = (batch, triton.cdiv(k, pre) * triton.cdiv(k, post))
    _atomic_pairs_kernel[grid](delta, idx, matrix, matrix.shape[0], k, BLOCK_PRE=pre, BLOCK_POST=post, num_warps=4)


def atomic_sum_rows(idx: Tensor, values: Tensor, n: int) -> Tensor:
    """out[i] = sum of values[b, j] over idx[b, j] = i: torch's index_add_, which adds by atomics on a GPU."""
    out = torch.zeros(n, values.shape[-1], dtype=values.dtype, device=values.device)
    return out.index_add_(0, idx.flatten(), values.flatten(0, 1))
