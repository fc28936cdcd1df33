"""Does the pattern settle, does it differ between inputs, is the whole pool in use: numbers and targets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from ..model import BrainLikeSprout
from .observation import Observation, observe

MIN_JACCARD, MAX_CHANGE, MIN_USED = 0.95, 0.02, 0.9


@dataclass(frozen=True)
class Band:
    """A quantity over the inputs: mean, 5th and 95th percentile, smallest and largest."""

    mean: float
    low: float
    high: float
    min: float
    max: float


@dataclass(frozen=True)
class Settling:
    """How n_inputs patterns over n_neurons settled in S steps.

    active: S + 1 bands of the number of active neurons, the initial pattern first.
    jaccard: S bands, overlap of the active sets before and after each step (dimensionless, 1 = the same neurons).
    gate_change: S bands, mean change of a gate in each step (dimensionless).
    used: share of the neurons that are active in some pattern of some input; used_at_end: in some settled pattern.
    final_counts: how many different numbers of active neurons the settled patterns have.
    """

    n_inputs: int
    n_neurons: int
    active: list[Band]
    jaccard: list[Band]
    gate_change: list[Band]
    used: float
    used_at_end: float
    final_counts: int

    def targets(self) -> dict[str, dict[str, Any]]:
        """What a settled SPROUT reaches: name -> {got, wanted, reached}; without steps the first three do not apply."""
        found: dict[str, dict[str, Any]] = {}
        if self.jaccard:
            means = [band.mean for band in self.jaccard]
            last, change = means[-1], self.gate_change[-1].mean
            rising = all(after >= before for before, after in pairwise(means))
            found["overlap of the last two steps"] = _target(last, f">= {MIN_JACCARD}", last >= MIN_JACCARD)
            found["overlap rises from step to step"] = _target([round(mean, 4) for mean in means], "no fall", rising)
            found["gate change in the last step"] = _target(change, f"<= {MAX_CHANGE}", change <= MAX_CHANGE)
        found["different counts of active neurons"] = _target(self.final_counts, ">= 2", self.final_counts >= 2)
        found["share of the neurons used"] = _target(self.used, f">= {MIN_USED}", self.used >= MIN_USED)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts, the targets among them: what analysis.json holds."""
        return {**asdict(self), "targets": self.targets()}


def measure(model: BrainLikeSprout, tokens: Tensor) -> Settling:
    """How the patterns of all prefixes of tokens settle: ``settling_of(observe(model, tokens))``.

    Args, Raises, Determinism: as ``observe``.
    """
    return settling_of(observe(model, tokens))


def settling_of(seen: Observation) -> Settling:
    """The same from inputs that were observed already."""
    return Settling(
        n_inputs=seen.n_inputs,
        n_neurons=seen.n_neurons,
        active=_bands(seen.active),
        jaccard=_bands(seen.jaccard),
        gate_change=_bands(seen.gate_change),
        used=float(seen.ever.mean()),
        used_at_end=len(seen.neuron) / seen.n_neurons,
        final_counts=len(np.unique(seen.active[:, -1])),
    )


def _bands(values: np.ndarray) -> list[Band]:
    """A band for each column of values (P, steps)."""
    columns = [column.astype(np.float64) for column in values.T]
    return [Band(*(float(x) for x in (c.mean(), *np.quantile(c, (0.05, 0.95)), c.min(), c.max()))) for c in columns]


def _target(got: Any, wanted: str, reached: bool) -> dict[str, Any]:
    return {"got": got, "wanted": wanted, "reached": bool(reached)}
