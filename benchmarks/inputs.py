"""Inputs of the benchmarks: random ones, and the patterns that a SPROUT makes of real text."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from bio_kernels import BlockSparse
from bio_kernels.testing import active_neurons, generator
from torch import Tensor, nn

from .case import Inputs, Spec

if TYPE_CHECKING:
    from sprout import BrainLikeSprout

BLOCKS_PER_ROW, BLOCK_SIZE = 8, 32
LARGEST_DENSE = 8192  # neurons whose N x N matrix, and the float64 dense baseline over it, fit everywhere
CPU_BYTES = 64 * 2**20  # on a CPU, inputs are drawn until together they are as large as this: beyond most caches


def input_sets(spec: Spec, device: str, make) -> list[Inputs]:
    """``make(spec, device, seed)`` as often as it takes until the inputs of one call have left the cache for the next.

    2 to 8 of them. On a GPU they share nothing, and together are at least twice the L2 cache where 8 are enough for
    that; what a call with B = 1 touches of them stays in the cache. On a CPU they share the connection matrix, which
    alone is as large as most caches.
    """
    first = make(spec, device, 0)
    sizes = {id(x): x.numel() * x.element_size() for x in first.values() if isinstance(x, Tensor)}
    size = sum(sizes.values())  # each tensor once, also where it has two names
    wanted = 2 * torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CPU_BYTES
    count = int(min(max(2, -(-wanted // max(size, 1))), 8))
    sets = [first, *(make(spec, device, seed) for seed in range(1, count))]
    return [x | {"cuda": device == "cuda"} for x in sets]


def normal(*shape: int, seed: int, spec: Spec, device: str) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(device=device, dtype=spec.dtype)


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


@lru_cache(maxsize=8)
def _sparse_matrix(n: int, dtype: torch.dtype, device: str, seed: int) -> BlockSparse:
    return BlockSparse.random(
        n,
        blocks_per_row=BLOCKS_PER_ROW,
        block_size=BLOCK_SIZE,
        std=0.3,
        generator=generator(2000 + seed),
        dtype=dtype,
    ).to(device)


@lru_cache(maxsize=8)
def _dense_matrix(n: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    return (torch.randn(n, n, generator=generator(1000 + seed)) * 0.3).to(device=device, dtype=dtype)


def forget() -> None:
    """Drops the matrices that are kept for the next row."""
    _sparse_matrix.cache_clear()
    _dense_matrix.cache_clear()


def strength(spec: Spec, device: str, seed: int) -> tuple[Tensor | BlockSparse, Tensor | None]:
    """The connection matrix as ours takes it, and as a dense matrix for the peers (None where N x N is too large)."""
    if spec.storage == "dense":
        # a CPU keeps one for all seeds: it is far larger than a cache, and takes longer to draw than to use
        matrix = leaf(_dense_matrix(spec.n, spec.dtype, device, seed if device == "cuda" else 0))
        return matrix, matrix
    sparse = _sparse_matrix(spec.n, spec.dtype, device, seed if device == "cuda" else 0)
    return sparse, None if spec.n > LARGEST_DENSE else leaf(sparse.to_dense())


def stored_blocks(like: BlockSparse, matrix: Tensor) -> Tensor:
    """The values of a dense (N, N) matrix at the blocks that ``like`` stores: (Z, P, P)."""
    p, rows = like.block_size, like.row_offsets.numel() - 1
    row = torch.repeat_interleave(torch.arange(rows, device=matrix.device), like.row_offsets.diff())
    return matrix.reshape(rows, p, rows, p).transpose(1, 2)[row, like.cols.long()]


def indices(spec: Spec, device: str, seed: int) -> Tensor:
    """idx (B, K), ascending and distinct, of the distribution that spec names."""
    if spec.distribution == "sprout":
        return sprout_patterns(spec.batch, spec.n, spec.k, seed).to(device)
    return active_neurons(spec.batch, spec.n, spec.k, spec.distribution, seed).to(device)


@cache
def sprout_patterns(batch: int, n: int, k: int, seed: int) -> Tensor:
    """idx (B, K): the neurons in which a SPROUT settles on windows of the embedded text."""
    from sprout import data

    tokens = next(data.batches(data.encode(data.corpus()), batch_size=batch, window=32, seed=seed + 1))
    model = _trained_sprout(n, k)
    with torch.no_grad():
        pattern = model.settle(tokens).history[-1]
    if bool((pattern.count != k).any()):
        raise RuntimeError(f"every pattern must fill its {k} slots, got {pattern.count.tolist()}")
    return pattern.idx.sort(1).values


@lru_cache(maxsize=1)
def _trained_sprout(n: int, k: int) -> BrainLikeSprout:
    """A narrow model (D = 64) after 10 batches of 8 windows of next-byte prediction.

    What it has learnt is little, yet samples share neurons as texts share bytes. No neuron is pruned, so that all K
    slots are in use.
    """
    from sprout import BrainLikeSprout, SproutConfig, data

    config = SproutConfig(
        n_neurons=n, d_state=64, n_heads=4, n_encoder_layers=1, n_interaction_steps=3, max_seq_len=32,
        initial_sparsity=k, final_sparsity=k, min_active=min(8, k), prune_threshold=0.0,
        connection="dense" if n <= LARGEST_DENSE else "block_sparse",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BrainLikeSprout(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    text = data.batches(data.encode(data.corpus()), batch_size=8, window=33)
    for window in itertools.islice(text, 10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(window[:, :-1]), window[:, -1]).backward()
        optimizer.step()
    return model


def grid(*, directions: tuple[str, ...], full: bool, cuda: bool, **fixed) -> list[Spec]:
    """The default rows of an operation over a dense matrix, or all of them.

    B = 1 and 32 in every direction for uniform indices, B = 32 in the last direction for the other distributions.
    With full: also B = 256 and K = 256. On a GPU also bfloat16.
    """
    last = directions[-1]
    specs = [Spec(b, direction=d, compiled=b == 32 and d == last, **fixed) for b in (1, 32) for d in directions]
    specs += [Spec(32, direction=last, distribution=kind, **fixed) for kind in ("zipf", "clustered", "sprout")]
    if full:
        specs += [Spec(256, direction=d, **fixed) for d in directions]
        specs += [Spec(32, k=256, direction=d, **fixed) for d in directions]
        specs = [replace(spec, compiled=True) for spec in specs]
    if cuda:
        specs += [replace(spec, dtype=torch.bfloat16) for spec in specs]
    return specs


def sparse_grid(direction: str, full: bool) -> list[Spec]:
    """Rows over a block-sparse connection matrix; with full also of 65,536 and 1,048,576 neurons."""
    pools = (4096, 65_536, 1_048_576) if full else (4096,)
    return [Spec(32, n=n, direction=direction, storage="block_sparse") for n in pools]
