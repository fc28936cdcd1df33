"""Running a model over a text in prefix mode, and keeping what the analyses need: sparse, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model import BrainLikeSprout
from ..pattern import ActivationPattern, gate_change, jaccard

WINDOW = 64  # tokens: what small models are trained on
_ROWS = 256  # prefixes at once: 256 x 256 slots of 256 float32 are 64 MiB


class Observation(NamedTuple):
    """What P inputs did to a pool of N neurons in S steps. Input b * T + t is the prefix tokens[b, :t+1].

    active: (P, S+1) int64, active neurons after each step, the initial pattern first.
    jaccard, gate_change: (P, S) float64, how far each step changed the pattern (dimensionless).
    ever: (N,) bool, active in at least one pattern of at least one input.
    neuron: (A,) int64 ascending, the neurons that are active in some settled pattern.
    offsets: (A+1,) int64: entries offsets[a] .. offsets[a+1] - 1 below are those of neuron[a].
    position: (E,) int32, the inputs in whose settled pattern the neuron is active, ascending; gate: (E,) float32.
    n_neurons: N.

    E is at most P * final_sparsity: 8 bytes for each place of a settled pattern, whatever the size of the pool.
    """

    active: np.ndarray
    jaccard: np.ndarray
    gate_change: np.ndarray
    ever: np.ndarray
    neuron: np.ndarray
    offsets: np.ndarray
    position: np.ndarray
    gate: np.ndarray
    n_neurons: int

    @property
    def n_inputs(self) -> int:
        """P."""
        return len(self.active)


def windows(tokens: Tensor, length: int) -> Tensor:
    """A text as consecutive windows: (L,) -> (L // length, length); fewer than length tokens are one window.

    Args: tokens (L,) int64, L >= 1; length in tokens, >= 1. The last tokens that do not fill a window are left out.
    Raises: ValueError for another shape, no tokens, or length < 1.
    """
    if tokens.dim() != 1 or not len(tokens):
        raise ValueError(f"tokens must be (L,) with L >= 1, got {tuple(tokens.shape)}")
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
    length = min(length, len(tokens))
    return tokens[: len(tokens) // length * length].view(-1, length)


def observe(model: BrainLikeSprout, tokens: Tensor) -> Observation:
    """What every prefix of every row of tokens does to the pool.

    Args: model, in any mode (it runs in eval mode and is left as it was); tokens (B, T) int64, on any device.
    Returns: Observation of P = B * T inputs. Raises: TypeError, ValueError as ``BrainLikeSprout.settle`` does: also
        for a model without config.causal. Gradients: none. Determinism: the same on every run of one machine.
    Memory: on the model's device, max(256, T) patterns at a time.
    """
    parts, ever = [], np.zeros(model.config.n_neurons, dtype=bool)
    device = model.pool.threshold.device
    with evaluating(model):
        for some in tokens.split(max(1, _ROWS // max(1, tokens.shape[-1]))):
            history = model.settle(some.to(device), all_positions=True).history
            parts.append(_part(history))
            for pattern in history:
                ever[pattern.idx[pattern.valid()].cpu().numpy()] = True
    active, overlap, change, count, neuron, gate = (np.concatenate(column) for column in zip(*parts, strict=True))
    position = np.repeat(np.arange(len(count), dtype=np.int32), count)
    order = neuron.argsort(kind="stable")
    used, first = np.unique(neuron[order], return_index=True)
    return Observation(
        active=active,
        jaccard=overlap,
        gate_change=change,
        ever=ever,
        neuron=used,
        offsets=np.append(first, len(neuron)),
        position=position[order],
        gate=gate[order],
        n_neurons=model.config.n_neurons,
    )


def _part(history: list[ActivationPattern]) -> tuple[np.ndarray, ...]:
    """active, jaccard, gate_change of some inputs; count of their settled patterns, and the entries of these."""
    last, changes = history[-1], list(pairwise(history))
    nothing = last.gate.new_zeros(len(last.count), 0)
    rows = [
        torch.stack([pattern.count for pattern in history], 1),
        torch.stack([jaccard(*pair).double() for pair in changes], 1) if changes else nothing.double(),
        torch.stack([gate_change(*pair).double() for pair in changes], 1) if changes else nothing.double(),
        last.count,
        last.idx[last.valid()].to(torch.int32),
        last.gate[last.valid()].float(),
    ]
    return tuple(row.cpu().numpy() for row in rows)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards every part is in the mode that it was in."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode
