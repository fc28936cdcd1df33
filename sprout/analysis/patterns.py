"""How one batch's patterns evolve over the interaction steps, in numbers: what the four plots show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..pattern import ActivationPattern

FEW, MANY = 20, 40  # bins of a histogram, by whether every pattern has 500 gates to fill them


class Evolution(NamedTuple):
    """A history of B samples and S interaction steps (S + 1 patterns, the initial one first), as numpy arrays.

    neuron: (A,) int64, the neurons that are ever active, by step of entry, then strongest first.
    entry: (A,) int64, the first step at which any sample has the neuron active (steps).
    mean_gate: (A, S+1) float64, mean over the samples, where a silent neuron's gate is 0 (dimensionless).
    count: (B, S+1) int64, active neurons.
    gate_edges: (bins+1,) float64; gate_share: (S+1, bins) float64, share of the active neurons' gates in each bin; a
        row sums to 1, or to 0 where nothing is active.
    n_neurons: N.
    """

    neuron: np.ndarray
    entry: np.ndarray
    mean_gate: np.ndarray
    count: np.ndarray
    gate_edges: np.ndarray
    gate_share: np.ndarray
    n_neurons: int


def evolution(history: Sequence[ActivationPattern]) -> Evolution:
    """The numbers of a history, such as ``analyze_activation(tokens)["activation_history"]``.

    Args: history, at least one pattern; all over the same batch (B >= 1) and pool; any device, any float dtype.
    Raises: TypeError for what is not an ActivationPattern; ValueError for an empty history, a batch of none,
        patterns of different batches or pools, a gate that is not finite.
    Determinism: exact. Memory: (S+1, N) float64 and what the history itself takes.
    """
    history = list(history)
    _check(history)
    n, samples = history[0].n_neurons, len(history[0].count)
    mean, ever = np.zeros((len(history), n)), np.zeros((len(history), n), dtype=bool)
    gates = []
    for step, pattern in enumerate(history):
        valid = pattern.valid().cpu().numpy()
        idx = pattern.idx.cpu().numpy()[valid]
        gates.append(pattern.gate.detach().double().cpu().numpy()[valid])
        if not np.isfinite(gates[-1]).all():
            raise ValueError(f"history must hold finite gates, got NaN or infinity in step {step}")
        mean[step] = np.bincount(idx, gates[-1], n) / samples
        ever[step, idx] = True
    neuron = np.flatnonzero(ever.any(0))
    entry = ever[:, neuron].argmax(0)
    order = np.lexsort((neuron, -mean[:, neuron].mean(0), entry))
    edges, share = _histograms(gates)
    count = np.stack([pattern.count.cpu().numpy() for pattern in history], 1)
    return Evolution(neuron[order], entry[order], mean[:, neuron[order]].T, count, edges, share, n)


def _histograms(gates: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    together = np.concatenate(gates)
    low, high = (together.min(), together.max()) if together.size else (0.0, 1.0)
    # Outward to multiples of 0.05, so that the axis starts and ends at a round gate.
    low, high = np.floor(low * 20) / 20, np.ceil(high * 20) / 20
    bins = MANY if min(map(len, gates)) >= 500 else FEW
    edges = np.linspace(low, high if high > low else low + 0.05, bins + 1)
    counts = np.stack([np.histogram(gate, edges)[0] for gate in gates])
    return edges, counts / counts.sum(1, keepdims=True).clip(1)


def _check(history: list[ActivationPattern]) -> None:
    if not history:
        raise ValueError("history must hold at least one ActivationPattern, got an empty one")
    for step, pattern in enumerate(history):
        if not isinstance(pattern, ActivationPattern):
            raise TypeError(f"history must hold ActivationPatterns, got {type(pattern).__name__} in step {step}")
        samples, n = len(pattern.count), pattern.n_neurons
        if samples < 1 or (samples, n) != (len(history[0].count), history[0].n_neurons):
            raise ValueError(
                f"history must be of one batch of at least one sample and one pool, got B={samples}, N={n} in step "
                f"{step} and B={len(history[0].count)}, N={history[0].n_neurons} in step 0"
            )
