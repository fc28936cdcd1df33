"""Pairs of neurons active together: reading them from a connection matrix, and summing into it.

    gather   tile[b, j, i] = strength[idx[b, j], idx[b, i]]            (pre, post), zeros where a slot or pair is absent
    add      strength[idx[b, j], idx[b, i]] += delta[b, j, i]          for all samples; repeated pairs add

idx (B, K) int32 or int64, distinct within a sample; count (B,) valid slots or None; delta and tile (B, K, K).
Gather: one program owns a tile of the (B, K, K) pairs. Add: one program owns a neuron as sender, so a whole row of the
matrix, and walks the (sample, slot) entries of that neuron in ascending order (see _index): no two programs touch the
same address, the order of the terms is fixed, and no atomics are needed. (Replacing atomics by one owner made the bias
gradient of a published attention kernel 20 to 30 times faster: aqlaboratory/openfold-3, pull request 271.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._index import Storage, inverted
from ._storage import locate

# A tile of 1,024 pairs is 8 a thread: their irregular loads are all in flight at once (estimate, not timed on a GPU).
# Searching the blocks of 2,048 pairs spilled registers (compiled, sm_90).
TILE_PAIRS = 1024
TILE_WARPS = 4
# Pairs of one entry added at once, 64 a warp: with 128 the search for blocks spilled registers (compiled, sm_90).
MAX_WALK = 256


@triton.jit
def valid_slots(count_ptr, pid_b, K):
    """How many slots of sample pid_b take part: K, or count[pid_b] where counts are given."""
    valid = K
    if count_ptr is not None:
        valid = tl.minimum(tl.load(count_ptr + pid_b), K).to(tl.int32)
    return valid


@triton.jit
def pair_tile(
    idx_ptr, count_ptr, row_offsets_ptr, cols_ptr, K, n,
    P: tl.constexpr, SEARCH_STEPS: tl.constexpr, SPARSE: tl.constexpr,
    BLOCK_PRE: tl.constexpr, BLOCK_POST: tl.constexpr,
):  # fmt: skip
    """This program's tile of the (B, K, K) pairs.

    -> sample; offs_pre (BLOCK_PRE,); offs_post (BLOCK_POST,); and, all (BLOCK_PRE, BLOCK_POST): the pairs' offset in
    (B, K, K), whether they are inside it, their offset in the matrix, whether they are present (valid and stored).
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles_post = tl.cdiv(K, BLOCK_POST)
    tiles = tl.cdiv(K, BLOCK_PRE) * tiles_post
    pid_b = pid // tiles
    tile = (pid % tiles).to(tl.int32)
    offs_pre = (tile // tiles_post) * BLOCK_PRE + tl.arange(0, BLOCK_PRE)
    offs_post = (tile % tiles_post) * BLOCK_POST + tl.arange(0, BLOCK_POST)
    valid = valid_slots(count_ptr, pid_b, K)
    pre = tl.load(idx_ptr + pid_b * K + offs_pre, mask=offs_pre < valid, other=-1)
    post = tl.load(idx_ptr + pid_b * K + offs_post, mask=offs_post < valid, other=-1)
    where, present = locate(row_offsets_ptr, cols_ptr, pre[:, None], post[None, :], n, P, SEARCH_STEPS, SPARSE)
    inside = (offs_pre < K)[:, None] & (offs_post < K)[None, :]
    pair = (pid_b * K + offs_pre[:, None]) * K + offs_post[None, :]
    return pid_b, offs_pre, offs_post, pair, inside, where, present


@triton.jit
def _gather_pairs_kernel(
    values_ptr, row_offsets_ptr, cols_ptr, idx_ptr, count_ptr, tile_ptr, K, n,
    P: tl.constexpr, SEARCH_STEPS: tl.constexpr, SPARSE: tl.constexpr,
    BLOCK_PRE: tl.constexpr, BLOCK_POST: tl.constexpr,
):  # fmt: skip
    _, _, _, pair, inside, where, present = pair_tile(
        idx_ptr, count_ptr, row_offsets_ptr, cols_ptr, K, n, P, SEARCH_STEPS, SPARSE, BLOCK_PRE, BLOCK_POST
    )
    # Writes: each program owns its tile.
    tl.store(tile_ptr + pair, tl.load(values_ptr + where, mask=present, other=0.0), mask=inside)


@triton.jit
def _add_pairs_kernel(
    delta_ptr, idx_ptr, count_ptr, neuron_ptr, entry_ptr, row_offsets_ptr, cols_ptr, values_ptr, K, n, entries,
    P: tl.constexpr, SEARCH_STEPS: tl.constexpr, SPARSE: tl.constexpr, BLOCK_POST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    me = tl.load(neuron_ptr + pid)
    before = tl.load(neuron_ptr + pid - 1, mask=pid > 0, other=-1)
    walking = (me != before) & (me < n)  # only the first entry of a neuron walks; entries that are not valid hold n
    entry = tl.load(entry_ptr + pid).to(tl.int64)
    while walking:
        pid += 1  # the next entry is on its way while this one is added
        walking = tl.load(neuron_ptr + pid, mask=pid < entries, other=-1) == me
        next_entry = tl.load(entry_ptr + pid, mask=walking, other=0).to(tl.int64)
        pid_b = entry // K
        valid = valid_slots(count_ptr, pid_b, K)
        for start in range(0, K, BLOCK_POST):
            offs_post = start + tl.arange(0, BLOCK_POST)
            mask_post = offs_post < K  # a mask by `valid` here would split the 128-bit loads
            post = tl.load(idx_ptr + pid_b * K + offs_post, mask=mask_post, other=-1)
            post = tl.where(offs_post < valid, post, -1)
            delta = tl.load(delta_ptr + entry * K + offs_post, mask=mask_post, other=0.0)  # (BLOCK_POST,)
            where, present = locate(row_offsets_ptr, cols_ptr, me, post, n, P, SEARCH_STEPS, SPARSE)
            # Writes: this program owns row `me`, and within one entry the posts are distinct.
            old = tl.load(values_ptr + where, mask=present, other=0.0)
            tl.store(values_ptr + where, old + delta, mask=present)
        tl.debug_barrier()  # in the next entry another thread may own the same address
        entry = next_entry


def storage_arguments(storage: Storage | None) -> dict:
    """The arguments by which every kernel finds strength[pre, post]; storage None: no matrix."""
    if storage is None:
        return {"row_offsets_ptr": None, "cols_ptr": None, "n": 0, "P": 1, "SEARCH_STEPS": 0, "SPARSE": False}
    return {
        "row_offsets_ptr": storage.row_offsets,
        "cols_ptr": storage.cols,
        "n": storage.n,
        "P": storage.block_size,
        "SEARCH_STEPS": storage.search_steps,
        "SPARSE": storage.sparse,
    }


def pair_grid(batch: int, k: int) -> tuple[tuple[int], dict]:
    """Grid and tile of a kernel that owns (B, K, K) pairs tile by tile."""
    block_post = min(triton.next_power_of_2(k), 128)
    block_pre = min(triton.next_power_of_2(k), TILE_PAIRS // block_post)
    grid = (batch * triton.cdiv(k, block_pre) * triton.cdiv(k, block_post),)
    return grid, {"BLOCK_PRE": block_pre, "BLOCK_POST": block_post, "num_warps": TILE_WARPS}


def gather_pairs(storage: Storage, idx: Tensor, count: Tensor | None) -> Tensor:
    """strength[idx[b, j], idx[b, i]] as (B, K, K) in the storage's dtype; zeros where a slot or a pair is absent."""
    batch, k = idx.shape
    tile = torch.empty(batch, k, k, dtype=storage.values.dtype, device=idx.device)
    if tile.numel():
        grid, blocks = pair_grid(batch, k)
        _gather_pairs_kernel[grid](
            values_ptr=storage.values, idx_ptr=idx, count_ptr=count, tile_ptr=tile, K=k,
            **storage_arguments(storage), **blocks,
        )  # fmt: skip
    return tile


def add_pairs_(storage: Storage, delta: Tensor, idx: Tensor, count: Tensor | None) -> None:
    """storage.values (float32) [idx[b, j], idx[b, i]] += delta[b, j, i] (B, K, K) float32, in place, deterministic."""
    k = idx.shape[1]
    if idx.numel() == 0 or storage.values.numel() == 0:
        return
    index = inverted(idx, storage.n, count)
    block_post = min(triton.next_power_of_2(k), MAX_WALK)
    _add_pairs_kernel[(idx.numel(),)](
        delta_ptr=delta, idx_ptr=idx, count_ptr=count, neuron_ptr=index.neuron, entry_ptr=index.entry,
        values_ptr=storage.values, K=k, entries=idx.numel(), BLOCK_POST=block_post,
        num_warps=max(1, block_post // 64), **storage_arguments(storage),
    )  # fmt: skip


def pair_gradient(delta: Tensor, idx: Tensor, count: Tensor | None, storage: Storage) -> Tensor:
    """Gradient of storage.values from delta (B, K, K) float32, that of its gathered pairs: added up, rounded once."""
    total = torch.zeros(
        storage.values.shape, dtype=torch.float32, device=delta.device
    )  # contiguous, as values may not be
    add_pairs_(storage._replace(values=total), delta, idx, count)
    return total.to(storage.values.dtype)
