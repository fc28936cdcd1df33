"""What every kernel file shares: the architecture it runs on, and where strength[pre, post] lives.

Dense (N, N): at pre * N + post. Block-sparse: block row r = pre // P owns the blocks from row_offsets[r] up to (not
including) row_offsets[r + 1], whose block columns ascend in cols; a binary search of SEARCH_STEPS halvings finds
post // P among them. A pair whose block is not stored, or whose index lies outside 0 .. N - 1, is absent: its offset is
0 and it must be masked off.
Offsets are int64: N * N passes 2**31 at N = 46,341.
"""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def _arch(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def arch_of(x: torch.Tensor) -> str:
    """Key of the configuration tables: "sm_90", "gfx942", ... for the GPU that holds x, or "cpu"."""
    return _arch(x.device) if x.is_cuda else "cpu"


@triton.jit
def locate(row_offsets_ptr, cols_ptr, pre, post, n, P: tl.constexpr, SEARCH_STEPS: tl.constexpr, SPARSE: tl.constexpr):
    """pre and post broadcast against each other -> (offset int64, present bool), both of the broadcast shape."""
    present = (pre >= 0) & (pre < n) & (post >= 0) & (post < n)
    pre = pre.to(tl.int64)
    post = post.to(tl.int64)
    if SPARSE:
        row = tl.where(present, pre // P, 0)
        col = tl.where(present, post // P, 0)
        low = tl.load(row_offsets_ptr + row).to(tl.int64)  # first block of the row
        end = tl.load(row_offsets_ptr + row + 1).to(tl.int64)
        high = end
        for _ in tl.static_range(SEARCH_STEPS):  # first block whose column is >= col
            mid = (low + high) // 2
            less = (low < high) & (tl.load(cols_ptr + mid, mask=present & (low < high), other=0) < col)
            high = tl.where(less | (low >= high), high, mid)
            low = tl.where(less, mid + 1, low)
        found = tl.load(cols_ptr + low, mask=present & (low < end), other=-1)
        present = present & (found == col)
        offset = low * (P * P) + (pre % P) * P + post % P
    else:
        offset = pre * n + post
    return tl.where(present, offset, 0), present
