"""Attention among the active neurons, biased by their synapses: forward pass, and what the backward pass shares.

    s_ij  = scale * q_i.k_j + strength[idx_j, idx_i]          receiver i, sender j
    out_i = sum_j gate_j exp(s_ij) v_j / sum_j gate_j exp(s_ij);       lse_i = log sum_j gate_j exp(s_ij)

q, k, v, out (B, H, K, Dh), lse (B, H, K) float32, idx (B, K), gate (B, K) or None, count (B,) or None, all contiguous.
One program owns BLOCK_M receivers of one sample and loops over the heads, so that the irregular gather of the strengths
is paid once for all heads; up to 256 senders fit one tile (plain softmax), more go through in tiles (online softmax:
M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867, 2018; in attention:
T. Dao et al., "FlashAttention", arXiv:2205.14135, 2022). A gate enters as log2(gate), added to the exponent in base 2.
A silent sender (gate 0) is not read, so its infinities cannot turn into 0 * inf; where none speaks, out is 0, lse +inf.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _storage
from ._index import Storage
from ._pairs import gather_pairs, storage_arguments, valid_slots
from ._storage import locate

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ANY = 2**31
FLOAT32_CHUNK = 32  # columns of a float32 dot at once: whole rows and their tf32 parts spill at Dh 128 (sm_90)
# (bytes of an element, senders, head width), each up to -> BLOCK_M receivers, BLOCK_N senders, warps, pipeline stages.
# Where K exceeds BLOCK_N, tiles of senders follow one another. Chosen for no spills (compiled), not yet timed on a GPU.
FORWARD = {
    (2, 128, 128): (32, 128, 8, 2),
    (2, 256, 128): (32, 256, 8, 2),
    (2, ANY, 128): (64, 64, 8, 2),
    (2, ANY, ANY): (32, 32, 8, 1),
    (4, ANY, 128): (32, 64, 8, 1),
    (4, ANY, ANY): (16, 32, 8, 1),
}
WIDE = 512  # wider heads should run, no more: at 1,024 bfloat16 takes 128 KiB, float32 spills (compiled, sm_90)
# 160 KiB of shared memory and more for a program; "cpu" is the interpreter. Others get small tiles (gfx942 has 64 KiB).
ROOMY = ("cpu", "sm_80", "sm_90", "sm_100", "sm_103")


@triton.jit
def load_rows(ptr, offs, mask, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns from first on of rows offs of a (K, D) matrix: (len, BLOCK_D), zeros where masked and past D."""
    offs_d = first + tl.arange(0, BLOCK_D)
    inside = mask[:, None]
    if D % BLOCK_D != 0:
        inside = inside & (offs_d < D)[None, :]
    return tl.load(ptr + offs[:, None] * D + offs_d[None, :], mask=inside, other=0.0)


@triton.jit
def row_products(
    x_ptr, offs_x, mask_x, y_ptr, offs_y, mask_y,
    D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
):  # fmt: skip
    """x_i . y_j of rows of two (K, D) matrices, (BLOCK_X, BLOCK_Y) float32, CHUNK columns at a time.

    Where CHUNK covers D this is one dot, and the compiler shares its loads with those of the same rows nearby.
    """
    acc = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    for first in range(0, D, CHUNK):
        x = load_rows(x_ptr, offs_x, mask_x, first, D, CHUNK)
        y = load_rows(y_ptr, offs_y, mask_y, first, D, CHUNK)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_rows(ptr, rows, offs, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of load_rows, rounding to the element type of ptr."""
    offs_d = tl.arange(0, BLOCK_D)
    inside = mask[:, None]
    if D != BLOCK_D:
        inside = inside & (offs_d < D)[None, :]
    tl.store(ptr + offs[:, None] * D + offs_d[None, :], rows.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def log_gates(gate_ptr, offs, valid):
    """log2 of the gates of slots offs, float32: -inf for a slot that sends nothing (gate 0, or from valid on)."""
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + offs, mask=offs < valid, other=0.0).to(tl.float32)
        log_gate = tl.where(gate == 0.0, float("-inf"), tl.log2(tl.where(gate == 0.0, 1.0, gate)))
    else:
        log_gate = tl.where(offs < valid, 0.0, float("-inf"))
    return log_gate


@triton.jit
def bias_tile(bias_ptr, offs_pre, offs_post, K):
    """bias[offs_pre, offs_post] of one sample's gathered (K, K) matrix, zeros past K."""
    inside = (offs_pre < K)[:, None] & (offs_post < K)[None, :]
    return tl.load(bias_ptr + offs_pre[:, None] * K + offs_post[None, :], mask=inside, other=0.0)


@triton.jit
def _receivers_bias(
    values_ptr, row_offsets_ptr, cols_ptr, idx_ptr, pid_b, offs_n, offs_m, valid, K, n,
    P: tl.constexpr, SEARCH_STEPS: tl.constexpr, SPARSE: tl.constexpr, GATHERED: tl.constexpr,
):  # fmt: skip
    """Bias (receivers offs_m, senders offs_n), from the matrix or from its gathered (B, K, K) pairs.

    It is read as (senders, receivers) and transposed: neighbouring lanes read along a row of the matrix.
    """
    if GATHERED:
        bias = bias_tile(values_ptr + pid_b * K * K, offs_n, offs_m, K)
    else:
        pre = tl.load(idx_ptr + pid_b * K + offs_n, mask=offs_n < valid, other=-1)
        post = tl.load(idx_ptr + pid_b * K + offs_m, mask=offs_m < valid, other=-1)
        where, present = locate(row_offsets_ptr, cols_ptr, pre[:, None], post[None, :], n, P, SEARCH_STEPS, SPARSE)
        bias = tl.load(values_ptr + where, mask=present, other=0.0)
    return tl.trans(bias)


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, idx_ptr, values_ptr, row_offsets_ptr, cols_ptr, gate_ptr, count_ptr, out_ptr, lse_ptr,
    K, n, scale,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, SEARCH_STEPS: tl.constexpr, SPARSE: tl.constexpr,
    GATHERED: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(K, BLOCK_M)
    pid_b = pid // blocks
    offs_m = (pid % blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)  # receivers
    valid = valid_slots(count_ptr, pid_b, K)
    mask_m = offs_m < valid
    if gate_ptr is not None:
        gate_ptr += pid_b * K
    end = BLOCK_N if ONE_TILE else valid
    if ONE_TILE:
        offs_n = tl.arange(0, BLOCK_N)  # senders
        log_gate = log_gates(gate_ptr, offs_n, valid)
        if values_ptr is not None:
            bias = _receivers_bias(
                values_ptr, row_offsets_ptr, cols_ptr, idx_ptr, pid_b, offs_n, offs_m, valid, K, n,
                P, SEARCH_STEPS, SPARSE, GATHERED,
            )  # (BLOCK_M, BLOCK_N), held for all heads  # fmt: skip
    for head in range(H):
        row = (pid_b * H + head) * K  # of q, k, v, out and lse
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, end, BLOCK_N):
            if not ONE_TILE:
                offs_n = start + tl.arange(0, BLOCK_N)
                log_gate = log_gates(gate_ptr, offs_n, valid)
                if values_ptr is not None:
                    bias = _receivers_bias(
                        values_ptr, row_offsets_ptr, cols_ptr, idx_ptr, pid_b, offs_n, offs_m, valid, K, n,
                        P, SEARCH_STEPS, SPARSE, GATHERED,
                    )  # fmt: skip
            speaks = log_gate != float("-inf")  # true for NaN, which must be seen
            s = row_products(
                q_ptr + row * D, offs_m, mask_m, k_ptr + row * D, offs_n, speaks, D, CHUNK, PRECISION, BLOCK_M, BLOCK_N
            )
            s = s * (scale * LOG2E) + log_gate[None, :]
            if values_ptr is not None:
                s += bias.to(tl.float32) * LOG2E
            s = tl.where(speaks[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            e = tl.exp2(s - shift[:, None])
            rescale = tl.exp2(top - shift)
            total = total * rescale + tl.sum(e, 1)
            v = load_rows(v_ptr + row * D, offs_n, speaks, 0, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
            acc = tl.dot(e.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
            top = new_top
        spoken = mask_m & (total != 0.0)
        out = tl.where(spoken[:, None], acc / tl.where(spoken, total, 1.0)[:, None], 0.0)
        lse = tl.where(spoken, (top + tl.log2(tl.where(spoken, total, 1.0))) * LN2, float("inf"))
        # Writes: each program owns its receivers.
        store_rows(out_ptr + row * D, out, offs_m, offs_m < K, D, BLOCK_D)
        tl.store(lse_ptr + row + offs_m, lse, mask=offs_m < K)


def launch_shape(table: dict, q: Tensor) -> tuple[tuple[int], dict]:
    """Grid and compile-time shape of a kernel that owns blocks of slots of q (B, H, K, Dh), from its table."""
    batch, heads, k, width = q.shape
    needed = (q.element_size(), k, width)
    key = next(most for most in table if all(a >= b for a, b in zip(most, needed, strict=True)))
    block_m, block_n, warps, stages = table[key]
    whole = max(16, triton.next_power_of_2(k))
    block_m, block_n = min(block_m, whole), min(block_n, whole)
    # Narrower than 64, the layout of the second dot repeats the scores over the warps and spills (compiled, sm_90).
    block_d = max(64, triton.next_power_of_2(width))
    if block_d > WIDE:  # what a tile reads of q, k, v and the gradients has to fit into shared memory
        block_m, block_n, stages = 16, 16, 1
    arch = _storage.arch_of(q)
    if arch not in ROOMY:
        block_m, block_n, stages = min(block_m, 32), min(block_n, 32), 1
    if arch == "sm_80" and block_n < k and (block_d > 64 or q.element_size() == 4):
        block_m = 16  # 32 rows spill 8 to 28 bytes there (compiled)
    return (batch * triton.cdiv(k, block_m),), {
        "H": heads,
        "D": width,
        "ONE_TILE": k <= block_n,
        # Three tf32 products keep float32-like accuracy on NVIDIA's tensor cores.
        "PRECISION": "tf32x3" if arch.startswith("sm_") and q.dtype == torch.float32 else "ieee",
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "CHUNK": min(block_d, FLOAT32_CHUNK) if q.element_size() == 4 else block_d,
        "num_warps": warps,
        "num_stages": stages,
    }


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, storage: Storage | None, gate: Tensor | None,
    count: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, K, Dh) in v's dtype and lse (B, H, K) float32 (natural). gate None: all 1; storage None: no bias."""
    out = torch.empty_like(v)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    grid, shape = launch_shape(FORWARD, q)
    # Tiles would be gathered again for every head; the search for 256 blocks a row spills registers (compiled, sm_90).
    gathered = storage is not None and (not shape["ONE_TILE"] or (storage.sparse and shape["BLOCK_N"] > 128))
    if gathered:
        storage = Storage(gather_pairs(storage, idx, count), storage.n)
    _attention_fwd_kernel[grid](
        q_ptr=q, k_ptr=k, v_ptr=v, idx_ptr=idx, values_ptr=storage.values if storage is not None else None,
        gate_ptr=gate, count_ptr=count, out_ptr=out, lse_ptr=lse, K=q.shape[2], scale=scale, GATHERED=gathered,
        **storage_arguments(storage), **shape,
    )  # fmt: skip
    return out, lse
