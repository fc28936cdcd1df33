"""Which inputs drive a neuron: the share of its gate's variance that a label explains, against shuffled labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .labels import Labels
from .observation import Observation

CONTROLS = ("shuffle", "shift")
_CELLS = 4_000_000  # (labels x neurons) sums held at a time, 32 MB in float64
_ENTRIES = 2_000_000  # places of patterns looked at together, 24 bytes each


class Specialisation(NamedTuple):
    """Selectivity of the A neurons that are active in some settled pattern, and of the control.

    kind, names: of the labels. neuron: (A,) int64. n_neurons: N, of which N - A stay silent and have no selectivity.
    selectivity: (A,) float64 in [0, 1]. control: (permutations * A,) float64, the same with labels that mean nothing.
    threshold: the 99th percentile of control. preferred: (A,) int64, the label that drives each neuron, -1 for none.
    """

    kind: str
    names: list[str]
    neuron: np.ndarray
    n_neurons: int
    selectivity: np.ndarray
    control: np.ndarray
    threshold: float
    preferred: np.ndarray

    @property
    def silent(self) -> int:
        """Neurons that no input has in its settled pattern."""
        return self.n_neurons - len(self.neuron)

    @property
    def share(self) -> float:
        """Share of the active neurons whose selectivity is above the threshold; chance alone gives about 0.01."""
        return float((self.selectivity > self.threshold).mean()) if len(self.neuron) else 0.0


def selectivity(
    seen: Observation, labels: Labels, *, permutations: int = 100, control: str = "shuffle", seed: int = 0
) -> Specialisation:
    """How much of each neuron's gate the labels explain, compared with labels that mean nothing.

    The index is the correlation ratio: with g_i the neuron's gate at input i (0 where silent), m its mean, and m_l, c_l
    mean and number of the inputs with label l,  eta^2 = sum_l c_l (m_l - m)^2 / sum_i (g_i - m)^2.
    Of the usual indices it is the robust one here: (max - rest) / (max + rest) takes the largest of many means, so one
    active input with a rare label gives a neuron the highest index there is; eta^2 weighs a label by its inputs, uses
    all of them, and with P inputs and L labels has the mean (L - 1) / (P - 1) over permutations for EVERY neuron,
    however rarely active. That makes one control distribution, pooled over neurons, a fair yardstick.
    A neuron's preferred label is the one that, set against all others, explains most, among those that raise the gate.

    Args:
        seen: P inputs. labels: of the same P inputs.
        permutations: >= 1, how often the control is drawn.
        control: "shuffle" permutes the labels; "shift" turns their sequence by a random distance, which keeps runs of
            equal labels: stricter, because neighbouring inputs resemble each other.
    Raises: ValueError for an unknown control, permutations < 1, labels of another number of inputs.
    Determinism: exact, the same seed gives the same control. Memory: 100 MB beside seen and control, or
        32 bytes per input if that is more.
    Source: Pearson 1905 (correlation ratio); Fisher 1935 (permutation).
    """
    if control not in CONTROLS:
        raise ValueError(f"control must be one of {', '.join(map(repr, CONTROLS))}, got {control!r}")
    if permutations < 1:
        raise ValueError(f"permutations must be >= 1, got {permutations}")
    if len(labels.index) != seen.n_inputs:
        raise ValueError(f"labels must be of the P={seen.n_inputs} inputs observed, got {len(labels.index)}")
    rng = np.random.default_rng(seed)
    spread = _spread(seen)
    found = _explained(seen, labels, labels.index, spread)
    drawn = [_explained(seen, labels, _redrawn(labels.index, control, rng), spread) for _ in range(permutations)]
    pooled = np.concatenate(drawn)
    # "higher": at most one in a hundred of the control is above it, whatever its size.
    threshold = float(np.quantile(pooled, 0.99, method="higher")) if pooled.size else 0.0
    return Specialisation(
        labels.kind, labels.names, seen.neuron, seen.n_neurons, found, pooled, threshold, _preferred(seen, labels)
    )


def tuning(seen: Observation, labels: Labels, neurons: np.ndarray) -> np.ndarray:
    """Mean gate of some neurons under each label: (len(neurons), L) float64, 0 for a neuron that is never active."""
    counts = np.bincount(labels.index, minlength=len(labels.names))
    means = np.zeros((len(neurons), len(labels.names)))
    where = np.searchsorted(seen.neuron, neurons)
    for row, (neuron, a) in enumerate(zip(neurons, where, strict=True)):
        if a < len(seen.neuron) and seen.neuron[a] == neuron:
            entries = slice(seen.offsets[a], seen.offsets[a + 1])
            sums = np.bincount(labels.index[seen.position[entries]], seen.gate[entries], len(labels.names))
            means[row] = sums / counts.clip(1)
    return means


def _redrawn(index: np.ndarray, control: str, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(index) if control == "shuffle" else np.roll(index, rng.integers(1, max(2, len(index))))


def _sums(seen: Observation, index: np.ndarray, n_labels: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Sums of gates by label, (L, some) float64, for one range of the A neurons after another."""
    width, begin = max(1, _CELLS // n_labels), 0
    while begin < len(seen.neuron):
        full = int(np.searchsorted(seen.offsets, seen.offsets[begin] + _ENTRIES, side="right")) - 1
        chunk = slice(begin, max(begin + 1, min(begin + width, full)))
        offsets = seen.offsets[begin : chunk.stop + 1]
        entries, size = slice(offsets[0], offsets[-1]), chunk.stop - begin
        column = np.repeat(np.arange(size), np.diff(offsets))
        cell = index[seen.position[entries]] * size + column
        yield chunk, np.bincount(cell, seen.gate[entries], n_labels * size).reshape(n_labels, size)
        begin = chunk.stop


def _totals(seen: Observation) -> tuple[np.ndarray, np.ndarray]:
    """Sum of each neuron's gates and of their squares."""
    if not len(seen.neuron):
        return np.zeros(0), np.zeros(0)
    gate = seen.gate.astype(np.float64)
    return np.add.reduceat(gate, seen.offsets[:-1]), np.add.reduceat(gate * gate, seen.offsets[:-1])


def _spread(seen: Observation) -> tuple[np.ndarray, np.ndarray]:
    """(A,) each: P m^2, and the sum of squares around the mean; 0 where that is nothing but rounding."""
    total, squares = _totals(seen)
    centre = total**2 / seen.n_inputs
    around = squares - centre
    return centre, np.where(around > 1e-12 * squares, around, 0)


def _explained(
    seen: Observation, labels: Labels, index: np.ndarray, spread: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """eta^2 of every neuron (A,), 0 for a gate that never changes."""
    counts = np.bincount(index, minlength=len(labels.names)).clip(1)
    centre, around = spread
    between = np.empty(len(seen.neuron))
    for chunk, sums in _sums(seen, index, len(labels.names)):
        between[chunk] = (sums**2 / counts[:, None]).sum(0)
    return np.where(around > 0, (between - centre) / np.where(around > 0, around, 1), 0).clip(0, 1)


def _preferred(seen: Observation, labels: Labels) -> np.ndarray:
    counts = np.bincount(labels.index, minlength=len(labels.names)).clip(1)[:, None]
    mean, preferred = _totals(seen)[0] / seen.n_inputs, np.full(len(seen.neuron), -1)
    rest = np.maximum(seen.n_inputs - counts, 1)
    for chunk, sums in _sums(seen, labels.index, len(labels.names)):
        raised = sums / counts - mean[chunk]
        explains = np.where(raised > 1e-9, raised**2 * counts * seen.n_inputs / rest, 0)
        preferred[chunk] = np.where(explains.any(0), explains.argmax(0), -1)
    return preferred
