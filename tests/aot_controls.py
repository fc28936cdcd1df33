"""Kernels that are wrong on purpose: the ahead-of-time rules must catch each of them, or they prove nothing."""

import torch
import triton
import triton.language as tl


@triton.jit
def _spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """The whole row lives in one warp's registers from the load to the store, and does not fit."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x - tl.max(x, 0))


@triton.jit
def _plain_dot_kernel(a_ptr, b_ptr, out_ptr, EDGE: tl.constexpr):
    """A float32 product in IEEE precision: no NVIDIA tensor core computes that."""
    offs = tl.arange(0, EDGE)[:, None] * EDGE + tl.arange(0, EDGE)[None, :]
    product = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), input_precision="ieee")
    tl.store(out_ptr + offs, product)


@triton.jit
def _narrow_product_kernel(strength_ptr, idx_ptr, out_ptr, n, K: tl.constexpr):
    """pre * n in 32 bits wraps from n = 46,341 on; widening the wrapped product afterwards does not mend it."""
    offs = tl.arange(0, K)
    idx = tl.load(idx_ptr + offs)
    offset = (idx[:, None] * n).to(tl.int64) + idx[None, :]
    tl.store(out_ptr + offs[:, None] * K + offs[None, :], tl.load(strength_ptr + offset))


def spilling() -> None:
    x = torch.empty(16384, device="meta")
    _spilling_kernel[(1,)](x, torch.empty_like(x), BLOCK=16384, num_warps=1)


def plain_dot() -> None:
    a = torch.empty(64, 64, device="meta")
    _plain_dot_kernel[(1,)](a, a, torch.empty_like(a), EDGE=64, num_warps=4)


def narrow_product() -> None:
    strength = torch.empty(65536, 65536, device="meta")
    idx = torch.empty(64, dtype=torch.int32, device="meta")
    _narrow_product_kernel[(1,)](strength, idx, torch.empty(64, 64, device="meta"), 65536, K=64)


CASES = {"spilling": spilling, "plain dot": plain_dot, "narrow product": narrow_product}
