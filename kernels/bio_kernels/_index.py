"""Where things are: the storage of a connection matrix, and the inverted index neuron -> (sample, slot).

The forward passes go from a sample to its active neurons. Every backward pass that sums into a table, and the
plasticity rule, go the other way: from a neuron to all the places it was active in. ``invert`` builds that index once
with a stable sort of B * K keys, so its cost depends on the active neurons and never on the size of the pool, and
``inverted`` hands the same one to every operation of a backward pass that asks for the same ``idx``. Summing along it,
one owner per neuron, needs no atomics: the order of the terms is fixed, and so are the bits of the result.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Storage(NamedTuple):
    """Values of an (N, N) matrix: all of them, or the stored P x P blocks of one (see BlockSparse).

    values: (N, N), or (Z, P, P) with row_offsets (N/P + 1,) and cols (Z,) ascending within a block row.
    search_steps: halvings that find one block among those of the longest block row (0 if dense).
    """

    values: Tensor
    n: int
    row_offsets: Tensor | None = None
    cols: Tensor | None = None
    search_steps: int = 0

    @property
    def sparse(self) -> bool:
        return self.row_offsets is not None

    @property
    def layout(self) -> tuple[Tensor, Tensor]:
        """row_offsets and cols of a block-sparse storage."""
        assert self.row_offsets is not None, "a dense storage has no block layout"
        assert self.cols is not None, "a dense storage has no block layout"
        return self.row_offsets, self.cols

    @property
    def block_size(self) -> int:
        return self.values.shape[-1] if self.sparse else 1


class InvertedIndex(NamedTuple):
    """The entries (sample, slot) of an ``idx`` (B, K), grouped by neuron.

    neuron: (B*K,) int32 or int64, ascending; entries that are not valid come last and hold n.
    entry: (B*K,) int32 or int64, the flat position b * K + j; ascending within a neuron.
    """

    neuron: Tensor
    entry: Tensor


def invert(idx: Tensor, n: int, count: Tensor | None = None) -> InvertedIndex:
    """Inverted index of idx (B, K); slots from count[b] on, and indices outside 0..n-1, are left out (neuron = n)."""
    small = torch.int32 if max(n, idx.numel()) < 2**31 else torch.int64
    valid = (idx >= 0) & (idx < n)
    if count is not None:
        valid &= torch.arange(idx.shape[1], device=idx.device) < count[:, None]
    keys = torch.where(valid, idx, n).to(small).flatten()
    neuron, entry = torch.sort(keys, stable=True)
    return InvertedIndex(neuron, entry.to(small))


# (backward pass, stream), idx, count, n, and what was built of them
_shared: list[tuple[tuple[int, int], weakref.ref[Tensor], weakref.ref[Tensor] | None, int, InvertedIndex]] = []
_SHARED = 8  # a model's backward pass works on a few steps at a time; an entry is 8 to 16 bytes an active neuron
_caller = threading.local()  # .alone: what it calls shares nothing


@contextmanager
def alone() -> Iterator[None]:
    """Within it ``inverted`` shares nothing: for what torch.compile calls, whose tensors die with its memory pool."""
    before = getattr(_caller, "alone", False)
    _caller.alone = True
    try:
        yield
    finally:
        _caller.alone = before


def inverted(idx: Tensor, n: int, count: Tensor | None = None) -> InvertedIndex:
    """``invert``, shared: within one backward pass the same tensors give the index that was built for them.

    Only there can nothing change an index unseen: between passes a loader may refill it, or a CUDA graph that is
    replayed, without a trace that could be checked without waiting for the device. Each stream has its own: another
    one would not wait until it is built.
    """
    task = torch._C._current_graph_task_id()
    if task == -1 or getattr(_caller, "alone", False):
        return invert(idx, n, count)
    key = (task, torch.cuda.current_stream(idx.device).cuda_stream if idx.is_cuda else 0)
    for built_in, idx_ref, count_ref, pool, built in _shared:
        without = count is None and count_ref is None
        same_count = without or (count is not None and count_ref is not None and count_ref() is count)
        if key == built_in and idx_ref() is idx and same_count and pool == n:
            return built
    built = invert(idx, n, count)
    _shared.insert(0, (key, weakref.ref(idx), None if count is None else weakref.ref(count), n, built))
    del _shared[_SHARED:]
    return built
