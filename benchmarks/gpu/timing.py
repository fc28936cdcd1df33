"""Times of single calls as the GPU sees them: many in one CUDA graph, over inputs that do not stay in its cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..measure import seconds

WARM_UP, REPLAYS = 3, 20
LEAST_S = 1e-3  # a graph is repeated within itself until it should take this long: events resolve about 1 us


def captured(job: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of job, warmed up on a side stream, and what job returned while it was captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            job()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = job()
    return graph, result


def graph_seconds(run: Callable[[Any], Any], sets: Sequence[Any]) -> float:
    """Median seconds of one run(x): a CUDA graph that takes every x of sets in turn, so that launches cost nothing.

    On a CPU, where there are no graphs, the median of plain calls.
    """
    if not torch.cuda.is_available():
        return _plain_seconds(run, sets)

    def once() -> None:
        for x in sets:
            run(x)

    once()
    repeats = max(1, min(20, int(LEAST_S / max(seconds(once, True), 1e-6))))

    def job() -> None:
        for _ in range(repeats):
            once()

    graph, _ = captured(job)
    for _ in range(WARM_UP):
        graph.replay()
    return statistics.median(seconds(graph.replay, True) for _ in range(REPLAYS)) / (repeats * len(sets))


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
