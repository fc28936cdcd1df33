"""Hebbian plasticity of the synapses between neurons that were active together.

    s[p, q] += eta / B * sum_b [p, q in idx_b] (pre_bp post_bq - decay post_bq^2 s_old[p, q])
    s[p, q]  = clamp(s[p, q], -bound, bound)

for the pairs (p, q) co-active in at least one sample; others keep their bits. decay = 1 is Oja's rule on those pairs
(E. Oja, "Simplified neuron model as a principal component analyzer", J. Math. Biology 15, 1982).
strength (N, N) or P x P blocks (Storage), float32 or 16 bit; idx, pre, post (B, K); count (B,) or None.
Three passes: every change is computed from the old strengths (one program per tile of pairs), added along the inverted
index in float32 (one program per sending neuron, _pairs), then clamped and rounded once (one program per tile).
16-bit strengths are summed in a float32 copy of which only the active pairs are ever written or read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._index import Storage
from ._pairs import add_pairs_, pair_grid, pair_tile, storage_arguments, valid_slots


@triton.jit
def _change_kernel(
    values_ptr, row_offsets_ptr, cols_ptr, idx_ptr, pre_ptr, post_ptr, count_ptr, delta_ptr, total_ptr,
    K, n, rate, decay,
    NEEDS_OLD: tl.constexpr, P: tl.constexpr, SEARCH_STEPS: tl.constexpr, SPARSE: tl.constexpr,
    BLOCK_PRE: tl.constexpr, BLOCK_POST: tl.constexpr,
):  # fmt: skip
    pid_b, offs_pre, offs_post, pair, inside, where, present = pair_tile(
        idx_ptr, count_ptr, row_offsets_ptr, cols_ptr, K, n, P, SEARCH_STEPS, SPARSE, BLOCK_PRE, BLOCK_POST
    )
    valid = valid_slots(count_ptr, pid_b, K)
    pre = tl.load(pre_ptr + pid_b * K + offs_pre, mask=offs_pre < valid, other=0.0).to(tl.float32)  # (BLOCK_PRE,)
    post = tl.load(post_ptr + pid_b * K + offs_post, mask=offs_post < valid, other=0.0).to(tl.float32)  # (BLOCK_POST,)
    delta = pre[:, None] * post[None, :]
    if NEEDS_OLD:
        old = tl.load(values_ptr + where, mask=present, other=0.0).to(tl.float32)
        delta -= decay * (post * post)[None, :] * old
        if total_ptr is not None:
            # Samples that share a pair write the same old strength.
            tl.store(total_ptr + where, old, mask=present)
    # Writes: each program owns its tile.
    tl.store(delta_ptr + pair, rate * delta, mask=inside)


@triton.jit
def _settle_kernel(
    values_ptr, row_offsets_ptr, cols_ptr, idx_ptr, count_ptr, total_ptr, K, n, bound,
    CLAMP: tl.constexpr, P: tl.constexpr, SEARCH_STEPS: tl.constexpr, SPARSE: tl.constexpr,
    BLOCK_PRE: tl.constexpr, BLOCK_POST: tl.constexpr,
):  # fmt: skip
    _, _, _, _, _, where, present = pair_tile(
        idx_ptr, count_ptr, row_offsets_ptr, cols_ptr, K, n, P, SEARCH_STEPS, SPARSE, BLOCK_PRE, BLOCK_POST
    )
    total = tl.load(total_ptr + where, mask=present, other=0.0)
    if CLAMP:  # comparisons, not min and max: NaN stays visible
        total = tl.where(total > bound, bound, tl.where(total < -bound, -bound, total))
    # Writes: samples that share a pair write the same bits, also when one reads what another has already clamped.
    tl.store(values_ptr + where, total.to(values_ptr.dtype.element_ty), mask=present)


def update_strength(
    storage: Storage, idx: Tensor, pre: Tensor, post: Tensor, eta: float, decay: float, bound: float | None,
    count: Tensor | None = None,
) -> None:  # fmt: skip
    """storage.values in place, by the rule above; slots from count[b] on are not read. Deterministic."""
    batch, k = idx.shape
    values = storage.values
    if idx.numel() == 0 or values.numel() == 0:
        return
    exact = values.dtype == torch.float32
    total = values if exact else torch.empty_like(values, dtype=torch.float32)
    delta = torch.empty(batch, k, k, dtype=torch.float32, device=idx.device)
    grid, blocks = pair_grid(batch, k)
    common = {"values_ptr": values, "idx_ptr": idx, "count_ptr": count, "K": k, **storage_arguments(storage), **blocks}
    _change_kernel[grid](
        pre_ptr=pre, post_ptr=post, delta_ptr=delta, total_ptr=None if exact else total,
        rate=eta / batch, decay=decay, NEEDS_OLD=decay != 0 or not exact, **common,
    )  # fmt: skip
    add_pairs_(storage._replace(values=total), delta, idx, count)
    if bound is not None or not exact:
        _settle_kernel[grid](total_ptr=total, bound=bound or 0.0, CLAMP=bound is not None, **common)
