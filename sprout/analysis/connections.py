"""The strongest synapses of a connection matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from bio_kernels import BlockSparse
from torch import Tensor

_ENTRIES = 1 << 22  # strengths looked at together: 16 MiB in float32


class Synapses(NamedTuple):
    """The M strongest synapses, largest magnitude first, and what they are taken from.

    pre, post: (M,) int64, sending and receiving neuron. strength: (M,) float64 (dimensionless), never 0.
    n_neurons: N. stored: entries that the matrix holds. positive, negative: how many of them are above and below 0;
    these three count connections of a neuron to itself only where they were asked for. largest_self: the largest
    magnitude of one.
    """

    pre: np.ndarray
    post: np.ndarray
    strength: np.ndarray
    n_neurons: int
    stored: int
    positive: int
    negative: int
    largest_self: float


@torch.no_grad()
def strongest_synapses(strength: Tensor | BlockSparse, top: int = 60, *, to_itself: bool = False) -> Synapses:
    """The strongest synapses by magnitude; ties go to the one stored first. Zero is no synapse.

    Args: strength, (N, N) tensor or BlockSparse, [pre, post], on any device; top >= 1, how many at most; to_itself,
        whether a neuron's connection to itself counts: left out by default, because a Hebbian rule makes these the
        strongest of all and they link nothing.
    Raises: ValueError if top < 1, the tensor is not square, or a strength is NaN.
    Determinism: exact. Memory: 32 MiB beside the matrix.
    """
    if top < 1:
        raise ValueError(f"top must be >= 1, got {top}")
    if isinstance(strength, Tensor) and (strength.dim() != 2 or strength.shape[0] != strength.shape[1]):
        raise ValueError(f"strength must be (N, N), got shape {tuple(strength.shape)}")
    nothing = torch.zeros(0, dtype=torch.int64)
    found, stored, positive, negative, largest_self = [(nothing, nothing, nothing.double())], 0, 0, 0, 0.0
    for values, own, place in _chunks(strength):
        if bool(values.isnan().any()):
            raise ValueError("strength must hold numbers, got NaN; the run that made it has diverged")
        flat, own = values.double().flatten(), own.to(values.device)
        if own.numel():
            largest_self = max(largest_self, flat[own].abs().max().item())
        if not to_itself:
            flat = flat.index_fill(0, own, 0)
        stored += flat.numel() - (0 if to_itself else own.numel())
        positive, negative = positive + int((flat > 0).sum()), negative + int((flat < 0).sum())
        chosen = _largest(flat.abs(), top)
        pre, post = place(chosen)
        found.append((pre.cpu(), post.cpu(), flat[chosen].cpu()))
    pre, post, value = (torch.cat(column).numpy() for column in zip(*found, strict=True))
    order = np.argsort(-np.abs(value), kind="stable")[:top]
    return Synapses(pre[order], post[order], value[order], strength.shape[0], stored, positive, negative, largest_self)


def _largest(magnitude: Tensor, top: int) -> Tensor:
    """Where the at most top largest are, zeros left out; of equal ones the first."""
    bar = magnitude.topk(min(top, magnitude.numel())).values[-1]
    above = (magnitude > bar).nonzero().squeeze(1)
    equal = ((magnitude == bar) & (magnitude > 0)).nonzero().squeeze(1)
    return torch.cat([above, equal[: top - len(above)]])


_Place = Callable[[Tensor], tuple[Tensor, Tensor]]


def _chunks(strength: Tensor | BlockSparse) -> Iterator[tuple[Tensor, Tensor, _Place]]:
    """Parts of the matrix: values, flat indices of the diagonal in them, and (pre, post) of flat indices."""
    if isinstance(strength, BlockSparse):
        yield from _block_chunks(strength)
        return
    n = strength.shape[0]
    rows = max(1, _ENTRIES // n)
    for begin in range(0, n, rows):
        part = strength[begin : begin + rows]
        own = torch.arange(len(part)) * (n + 1) + begin

        def place(flat: Tensor, begin: int = begin) -> tuple[Tensor, Tensor]:
            return begin + flat // n, flat % n

        yield part, own, place


def _block_chunks(matrix: BlockSparse) -> Iterator[tuple[Tensor, Tensor, _Place]]:
    p, device = matrix.block_size, matrix.blocks.device
    block_rows = torch.arange(matrix.row_offsets.numel() - 1, device=device)
    row, col = block_rows.repeat_interleave(matrix.row_offsets.diff().long()), matrix.cols.long()
    size = max(1, _ENTRIES // p**2)
    for begin in range(0, len(matrix.blocks), size):
        part = matrix.blocks[begin : begin + size]
        diagonal = (row == col)[begin : begin + size].nonzero()
        own = (diagonal * p**2 + torch.arange(p, device=device) * (p + 1)).flatten()

        def place(flat: Tensor, begin: int = begin) -> tuple[Tensor, Tensor]:
            block, within = begin + flat // p**2, flat % p**2
            return row[block] * p + within // p, col[block] * p + within % p

        yield part, own, place
