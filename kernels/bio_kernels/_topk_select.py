"""The k highest of a row of scores, exactly: which they are, in ascending order of index.

score (B, N) -> gate (B, k) = score[idx] and idx (B, k) int64. Ties go to the lowest index, -0.0 equals 0.0, NaN is
greatest. No sort, no histogram, no candidate buffer of fixed size: a program holds up to 8192 scores in registers as
unsigned keys in the order of the scores, searches the k-th key by three-way division (two counts a pass, packed in one
int32, so that a pass costs one integer reduction), stops early once exactly k keys lie above, and packs the selected
by a prefix sum. Program (b, s) owns chunk s of row b. One chunk: done in one launch, and the rows of a table may be
fetched in the same program. More: each chunk leaves its k best, in order, as a shorter row with its indices, until one
chunk is left. Order within a row never changes, so the lowest index still wins a tie in the last stage. Nothing is
summed in floating point, so every launch gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _storage

WHOLE = 8192  # a row up to this long is one chunk: 16 scores a thread in 16 warps; 16,384 scores spilled on sm_90
CHUNK = 4096  # scores of a chunk of a longer row, if k is small: two such programs share a multiprocessor
# A thread's limit on NVIDIA. Left to itself, ptxas spilled a few bytes to reach the next lower step (sm_90); 96 was too
# few for the stages that read indices, and 112 leaves room for as many programs.
REGISTERS = 112


@triton.jit
def _sortable(x):
    """Unsigned keys in the order of x (NaN greatest, -0.0 as 0.0); 0 is no score's key. 16 bits for 16-bit scores."""
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    SIGN: tl.constexpr = 1 << (BITS - 1)
    FULL: tl.constexpr = (1 << BITS) - 1
    if BITS == 16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        bits = x.to(tl.uint32, bitcast=True)
    value = x.to(tl.float32)
    key = tl.where((bits & SIGN) != 0, bits ^ FULL, bits | SIGN)
    key = tl.where(value == 0.0, tl.full(key.shape, SIGN, tl.uint32), key)
    return tl.where(value != value, tl.full(key.shape, FULL, tl.uint32), key)


@triton.jit
def _threshold(key, size, k, BITS: tl.constexpr):
    """(T, need): the k highest of the keys are those above T and the first `need` of those equal to T.

    low .. high brackets the k-th highest key; above = keys > high, reached = keys >= low. Counts stay below 2**16.
    """
    low = tl.full((), 1, tl.uint32)
    high = tl.full((), (1 << BITS) - 1, tl.uint32)
    above = tl.full((), 0, tl.int32)
    reached = size.to(tl.int32)
    while (low < high) & (reached > k):
        step = (high - low) // 3 + 1
        first = low + step
        second = low + tl.minimum(2 * step, high - low)
        both = (key >= first).to(tl.int32) + (key >= second).to(tl.int32) * 65536
        packed = tl.sum(both, axis=0)
        at_first = packed & 65535
        at_second = (packed >> 16) & 65535
        upper = at_second >= k
        middle = (at_first >= k) & (at_second < k)
        low = tl.where(upper, second, tl.where(middle, first, low))
        reached = tl.where(upper, at_second, tl.where(middle, at_first, reached))
        above = tl.where(upper, above, tl.where(middle, at_second, at_first))
        high = tl.where(upper, high, tl.where(middle, second - 1, first - 1))
    return low, k - above


@triton.jit
def copy_rows(table_ptr, idx_ptr, rows_ptr, slot, k, dim, BLOCK_D: tl.constexpr):
    """rows[slot] = table[idx[slot]], for a vector of slots of one sample."""
    neuron = tl.load(idx_ptr + slot, mask=slot < k, other=0).to(tl.int64)
    for start in range(0, dim, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = (slot < k)[:, None] & (offs_d < dim)[None, :]
        x = tl.load(table_ptr + neuron[:, None] * dim + offs_d[None, :], mask=mask)  # (BLOCK_K, BLOCK_D)
        tl.store(rows_ptr + slot.to(tl.int64)[:, None] * dim + offs_d[None, :], x, mask=mask)


@triton.jit
def _select_kernel(
    part_ptr, index_ptr, score_ptr, table_ptr, chosen_ptr, gate_ptr, idx_ptr, rows_ptr,
    length, kept, n, k, dim, table_stride,
    GATHER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    size = tl.minimum(length - pid_s * BLOCK_N, BLOCK_N).to(tl.int32)
    mask_n = pid_s * BLOCK_N + offs_n < length
    begin = pid_b * length + pid_s * BLOCK_N
    x = tl.load(part_ptr + begin + offs_n, mask=mask_n, other=0.0)  # (BLOCK_N,)
    key = tl.where(mask_n, _sortable(x), 0)
    k_here = tl.minimum(size, k)
    threshold, need = _threshold(key, size, k_here, x.dtype.primitive_bitwidth)

    equal = key == threshold
    upto = tl.cumsum((key > threshold).to(tl.int32) + equal.to(tl.int32) * 65536, axis=0)  # two prefix counts, packed
    equal_upto = (upto >> 16) & 65535
    selected = (key > threshold) | (equal & (equal_upto <= need))
    slot = (upto & 65535) + tl.minimum(equal_upto, need) - 1
    chosen_ptr += pid_b * kept + pid_s * k
    gate_ptr += pid_b * kept + pid_s * k
    if index_ptr is None:
        neuron = (pid_s * BLOCK_N).to(chosen_ptr.dtype.element_ty) + offs_n
    else:
        neuron = tl.load(index_ptr + begin + offs_n, mask=selected)
    tl.store(chosen_ptr + slot.to(tl.int64), neuron, mask=selected)  # slots are distinct: one writer each
    tl.debug_barrier()  # the indices are read below by other threads of this program
    for start in range(0, k_here, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        chosen = tl.load(chosen_ptr + offs_k, mask=offs_k < k_here, other=0).to(tl.int64)
        gate = tl.load(score_ptr + pid_b * n + chosen, mask=offs_k < k_here)  # (BLOCK_K,)
        tl.store(gate_ptr + offs_k, gate, mask=offs_k < k_here)
        if idx_ptr is not None:
            tl.store(idx_ptr + pid_b * k + offs_k, chosen, mask=offs_k < k_here)
        if GATHER:
            target_ptr = rows_ptr + pid_b * k * dim
            copy_rows(table_ptr + pid_b * table_stride, chosen_ptr, target_ptr, offs_k, k, dim, BLOCK_D)


def _chunk(n: int, k: int) -> int:
    """Scores a program holds: the whole row, or at least 2 k of it, so that every stage shrinks the row."""
    if n <= WHOLE:
        return max(128, triton.next_power_of_2(n))
    if 2 * k > WHOLE:
        raise RuntimeError(
            f"the Triton top-k of more than {WHOLE} neurons takes k <= {WHOLE // 2}, got k={k}, N={n}; "
            "use backend='reference'"
        )
    return CHUNK if k <= CHUNK // 16 else WHOLE


def select(score: Tensor, k: int, gather: dict | None = None) -> tuple[Tensor, Tensor]:
    """gate (B, k) and idx (B, k) int64, ascending, of the k highest of score (B, N), N >= k >= 1, B >= 1.

    gather: table_ptr, rows_ptr, dim, table_stride, BLOCK_K, BLOCK_D of a table whose rows the last launch fetches too.
    """
    nothing = dict(table_ptr=None, rows_ptr=None, dim=1, table_stride=0, BLOCK_K=256, BLOCK_D=16)
    registers = {"maxnreg": REGISTERS} if _storage.arch_of(score).startswith("sm_") else {}
    batch, n = score.shape
    part, index = score, None  # what is left of the rows, and which neurons those are
    while True:
        length = part.shape[1]
        block = _chunk(length, k)
        chunks = triton.cdiv(length, block)
        kept = (chunks - 1) * k + min(k, length - (chunks - 1) * block)
        last = chunks == 1
        gate = torch.empty((batch, kept), dtype=score.dtype, device=score.device)
        chosen = torch.empty((batch, kept), dtype=torch.int32 if n < 2**31 else torch.int64, device=score.device)
        idx = torch.empty((batch, k), dtype=torch.int64, device=score.device) if last else None
        fetch = gather if last and gather is not None else nothing
        _select_kernel[(batch, chunks)](
            part_ptr=part, index_ptr=index, score_ptr=score, chosen_ptr=chosen, gate_ptr=gate, idx_ptr=idx,
            length=length, kept=kept, n=n, k=k, GATHER=fetch is not nothing, BLOCK_N=block,
            num_warps=8 if block <= CHUNK else 16, **registers, **fetch,
        )  # fmt: skip
        if idx is not None:
            return gate, idx
        part, index = gate, chosen
