"""Seeded inputs, awkward sizes and the one tolerance table, shared by tests and benchmarks.

An error is the largest absolute difference from the float64 dense baseline, divided by the largest absolute value of
that baseline (or by 1e-30 where all of it is 0): the measure does not reward a large tensor for its small entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_sparse import BlockSparse

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SIZES = (1, 7, 13, 127, 300)  # none of them a multiple of a tile
DISTRIBUTIONS = ("uniform", "zipf", "clustered")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|; NaN if a value is NaN in only one of them; 0 if both are empty."""
    if actual.shape != expected.shape:
        raise ValueError(f"actual must have the shape of expected, {tuple(expected.shape)}, got {tuple(actual.shape)}")
    actual, expected = actual.detach().to(expected.device).double(), expected.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())  # also infinities of one sign
    if bool(same.all()):
        return 0.0
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return float((actual - expected).masked_fill(same, 0).abs().max()) / max(scale, 1e-30)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "result") -> float:
    """AssertionError unless the error is within the table's tolerance for dtype (NaN never passes); the error."""
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[dtype], f"{what}: error {error:.3g} is above {TOLERANCE[dtype]:.3g} ({dtype})"
    return error


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def active_neurons(batch: int, n: int, k: int, kind: str = "uniform", seed: int = 0) -> Tensor:
    """idx (B, K) int64, ascending, distinct within a sample.

    kind: "uniform"; "zipf" (the neuron of rank r is drawn with weight 1 / r: some are active in nearly all samples);
    "clustered" (neighbours of a few random centres).
    """
    if kind not in DISTRIBUTIONS:
        raise ValueError(f"kind must be one of {', '.join(DISTRIBUTIONS)}, got {kind!r}")
    g = generator(seed)
    noise = torch.rand(batch, n, generator=g)
    if kind == "zipf":  # Gumbel top-k: sampling without replacement with these weights
        weight = 1.0 / torch.arange(1, n + 1)[torch.randperm(n, generator=g)]
        noise = weight.log() - (-noise.clamp_min(1e-20).log()).log()
    elif kind == "clustered":
        centres = torch.randint(n, (batch, max(1, k // 16)), generator=g)
        distance = (torch.arange(n)[None, :, None] - centres[:, None]).abs().amin(-1)
        noise = -distance - noise
    return noise.topk(k, dim=1).indices.sort(1).values


@dataclass
class Inputs:
    """The arguments of all operations for one shape, float64 on the CPU; ``to`` makes what a test or benchmark runs."""

    score: Tensor  # (B, N)
    table: Tensor  # (N, D)
    idx: Tensor  # (B, K)
    q: Tensor  # (B, H, K, Dh)
    k: Tensor
    v: Tensor
    strength: Tensor | BlockSparse  # (N, N)
    gate: Tensor  # (B, K) in (0, 1)
    pre: Tensor  # (B, K)
    post: Tensor  # (B, K)

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu", grad: bool = False) -> Inputs:
        """The same values rounded to dtype, each a leaf of its own (with gradients if asked for)."""
        moved = {}
        for name, x in self.__dict__.items():
            if isinstance(x, BlockSparse):
                moved[name] = BlockSparse(
                    _leaf(x.blocks, dtype, device, grad), x.row_offsets.to(device), x.cols.to(device)
                )
            else:
                moved[name] = _leaf(x, dtype, device, grad)
        return Inputs(**moved)


def _leaf(x: Tensor, dtype: torch.dtype, device: str | torch.device, grad: bool) -> Tensor:
    if not x.is_floating_point():
        return x.to(device)
    return x.detach().to(device=device, dtype=dtype, copy=True).requires_grad_(grad)


def make_inputs(
    batch: int,
    n: int,
    k: int,
    *,
    width: int = 8,
    heads: int = 2,
    head_width: int = 4,
    storage: str = "dense",
    block_size: int = 16,
    kind: str = "uniform",
    seed: int = 0,
) -> Inputs:
    """Random inputs whose values are exact in bfloat16, so that every dtype starts from the same numbers.

    storage: "dense", or "block_sparse" with about a third of the blocks stored and at least one empty block row if
    there are several (n must then be a multiple of block_size).
    """
    g = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).bfloat16().double()

    strength: Tensor | BlockSparse = normal(n, n)
    if storage == "block_sparse":
        rows = n // block_size
        kept = torch.rand(rows, rows, generator=g) < 0.35
        kept[0, 0] = True
        kept[rows - 1] = rows == 1
        mask = kept.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
        strength = BlockSparse.from_dense(strength.masked_fill(~mask, 0), block_size)
    qkv = [normal(batch, heads, k, head_width) for _ in range(3)]
    gate = torch.rand(batch, k, generator=g).mul(0.9).add(0.05).bfloat16().double()
    return Inputs(
        score=normal(batch, n),
        table=normal(n, width),
        idx=active_neurons(batch, n, k, kind, seed),
        q=qkv[0],
        k=qkv[1],
        v=qkv[2],
        strength=strength,
        gate=gate,
        pre=normal(batch, k),
        post=normal(batch, k),
    )
