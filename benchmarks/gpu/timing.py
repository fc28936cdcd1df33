"""Times of single calls as the GPU sees them: many in one CUDA graph, over inputs that do not stay in its cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..measure import captured, replay_seconds, seconds

WARM_UP, REPLAYS = 3, 20
WARM_UP_S = 0.2  # until the GPU has raised its clocks
LEAST_S, MOST_REPEATS = 1e-3, 50  # a graph is repeated within itself until it takes this long: events resolve 1 us


def graph_seconds(run: Callable[[Any], Any], sets: Sequence[Any]) -> float:
    """Median seconds of one run(x): a CUDA graph that takes every x of sets in turn, so that launches cost nothing.

    On a CPU, where there are no graphs, the median of plain calls.
    """
    if not torch.cuda.is_available():
        return _plain_seconds(run, sets)

    def once() -> None:
        for x in sets:
            run(x)

    def repeated(times: int) -> torch.cuda.CUDAGraph:
        def job() -> None:
            for _ in range(times):
                once()

        graph, _ = captured(job)
        end = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < end:
            graph.replay()
            torch.cuda.synchronize()
        return graph

    graph = repeated(1)
    repeats = max(1, min(MOST_REPEATS, int(LEAST_S / replay_seconds(graph))))
    if repeats > 1:
        graph = repeated(repeats)
    return statistics.median(replay_seconds(graph) for _ in range(REPLAYS)) / (repeats * len(sets))


def eager_seconds(job: Callable[[], Any], cuda: bool, rounds: int = 20) -> float:
    """Median seconds of a call that is launched from Python, after a warm-up."""
    for _ in range(WARM_UP if cuda else 1):
        job()
    return statistics.median(seconds(job, cuda) for _ in range(rounds if cuda else 1))


def _plain_seconds(run: Callable[[Any], Any], sets: Sequence[Any]) -> float:
    taken = []
    for x in sets:
        begin = time.perf_counter()
        run(x)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)
