"""Parity first, then time: ours and every peer in turn, A B C A B C ..., so that a noisy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bio_kernels.testing import TOLERANCE, assert_close, relative_error
from torch import Tensor

from .case import Case, Contestant, Inputs, clone_inputs, leaves
from .memory import peak_bytes
from .roofline import Roofline

BUDGET_S = 1.5  # time for the rounds of one row, all contestants together; the default suite has about 45 rows
MIN_ROUNDS, MIN_ROUNDS_OF_PEER, MAX_ROUNDS = 5, 3, 60
PEER_TOLERANCE = 10  # a peer whose rounding is a few times worse than ours is still a peer
REPEATS = 3  # runs that must agree to the bit
FAILED_CAPTURES: list[str] = []  # of this process: torch's allocator then believes that a capture is still under way
SPIN = 400_000  # cycles, about 0.2 ms: longer than it takes to launch the graph of an operation


class WrongResult(AssertionError):
    """Ours is not the operation: nothing is timed."""


def seconds(job: Callable[[], Any], cuda: bool) -> float:
    """Time of one call, between two events on a GPU; what it returns is freed after the clock has stopped."""
    if cuda:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = job()
        stop.record()
        stop.synchronize()
        del result
        return start.elapsed_time(stop) * 1e-3
    begin = time.perf_counter()
    result = job()
    end = time.perf_counter()
    del result
    return end - begin


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Time of one replay; the GPU is kept busy until all of it is queued, so that launching it is not measured."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN)
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3


def _gradients(contestant: Contestant, out: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad([o for o in out if o.requires_grad], leaves(contestant, inputs), inputs["grad"])


def prepare(contestant: Contestant, direction: str, inputs: Inputs) -> Callable[[], Any]:
    """What is to be timed; for "backward" the forward pass has then been made."""
    if direction in ("forward", "update"):

        def forward():
            with torch.no_grad():
                return contestant.run(inputs)

        return forward
    if direction == "backward":
        out = contestant.run(inputs)
        return lambda: _gradients(contestant, out, inputs)
    return lambda: _gradients(contestant, contestant.run(inputs), inputs)


def results(case: Case, contestant: Contestant) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs in canonical order, and gradients by name, on the first inputs."""
    inputs = case.sets[0]
    if case.spec.direction == "update":
        with torch.no_grad():
            return list(case.canonical(contestant.run(clone_inputs(inputs)))), {}
    if case.spec.direction == "forward":  # as it is timed: a compiler makes something else of it than with gradients
        with torch.no_grad():
            return list(case.canonical(contestant.run(inputs))), {}
    out = case.canonical(contestant.run(inputs))
    grads = _gradients(contestant, out, inputs)
    return [o.detach() for o in out], case.gradients(dict(zip(contestant.leaves, grads, strict=True)))


def gate(case: Case) -> float:
    """The largest error of ours against float64. Raises WrongResult if one is above the tolerance table's."""
    wanted, wanted_grads = case.truth()
    out, grads = results(case, case.ours)
    pairs = [(f"output {i}", x, y) for i, (x, y) in enumerate(zip(out, wanted, strict=True))]
    pairs += [(f"gradient of {name}", x, wanted_grads[name]) for name, x in grads.items()]
    try:
        return max(_assert_close(case, what, x, y) for what, x, y in pairs)
    except AssertionError as error:
        raise WrongResult(f"{case.op} {case.spec} {error}") from None


def _assert_close(case: Case, what: str, actual: Tensor, expected: Tensor) -> float:
    if case.slack == 1:
        return assert_close(actual, expected, case.spec.dtype, what)
    error, allowed = relative_error(actual, expected), TOLERANCE[case.spec.dtype] * case.slack
    assert error <= allowed, f"{what}: error {error:.3g} is above {allowed:.3g}"
    return error


def admit(case: Case) -> list[Contestant]:
    """The peers that can run here and compute the same; why the others do not is added to ``case.not_run``."""
    wanted, wanted_grads = case.truth()
    admitted = []
    for peer in case.peers:
        if case.spec.direction not in peer.directions:
            case.not_run[peer.name] = f"no {case.spec.direction} here"
            continue
        try:
            out, grads = results(case, peer)
        except Exception as error:  # a peer's own limits, and those of its compiler
            case.not_run[peer.name] = f"{type(error).__name__}: {str(error).strip()[:160]}"
            continue
        errors = [relative_error(x, y) for x, y in zip(out, wanted, strict=True)]
        errors += [relative_error(x, wanted_grads[name]) for name, x in grads.items()]
        if not max(errors) <= PEER_TOLERANCE * case.slack * TOLERANCE[case.spec.dtype]:
            case.not_run[peer.name] = f"wrong result: error {max(errors):.1e}"
        else:
            admitted.append(peer)
    return admitted


def same_bits(case: Case) -> bool:
    """Whether ours gives the same bits every time."""

    def once() -> list[Tensor]:
        out, grads = results(case, case.ours)
        return [*out, *grads.values()]

    first = once()
    again = [once() for _ in range(REPEATS - 1)]
    return all(torch.equal(x, y) for run in again for x, y in zip(first, run, strict=True))


def race(benchmark, contestants: list[Contestant], case: Case) -> dict[str, list[float]]:
    """Times by contestant, ours first; those of ours are also what pytest-benchmark records.

    Each gets an equal share of the time. A peer so slow that its share allows fewer rounds than ours sits out some of
    them, evenly spread.
    """
    ours, *peers = contestants
    cuda, direction = case.sets[0]["cuda"], case.spec.direction
    rounds = {c.name: _rounds(c, case, BUDGET_S / len(contestants)) for c in contestants}
    total = max(rounds[ours.name], MIN_ROUNDS)
    times: dict[str, list[float]] = {c.name: [] for c in contestants}

    def before():
        i = len(times[ours.name])
        for j, peer in enumerate(peers, start=1):  # in one round nobody finds the inputs that another has just read
            turns = min(rounds[peer.name], total)
            if i * turns // total != (i + 1) * turns // total:
                inputs = case.sets[(i + j) % len(case.sets)]
                times[peer.name].append(seconds(prepare(peer, direction, inputs), cuda))
        return (prepare(ours, direction, case.sets[i % len(case.sets)]),), {}

    benchmark.pedantic(lambda job: times[ours.name].append(seconds(job, cuda)), setup=before, rounds=total)
    return times


def _rounds(contestant: Contestant, case: Case, share: float) -> int:
    """How often the contestant can run in its share of the time, judged by one call; the parity check warmed it up."""
    inputs = case.sets[-1]
    begin = time.perf_counter()
    seconds(prepare(contestant, case.spec.direction, inputs), inputs["cuda"])
    taken = time.perf_counter() - begin
    return int(min(max(share / taken, MIN_ROUNDS_OF_PEER), MAX_ROUNDS))


def graph_times(contestants: list[Contestant], case: Case, rounds: int = 30) -> dict[str, list[float]]:
    """The same race with each contestant replayed from a CUDA graph; one that cannot be captured is left out.

    After a capture that failed nothing else is captured in this process, see FAILED_CAPTURES.
    """
    graphs: dict[str, list[torch.cuda.CUDAGraph]] = {}
    for contestant in contestants:
        if contestant.waits or FAILED_CAPTURES:
            why = "it waits for the GPU" if contestant.waits else f"the capture of {FAILED_CAPTURES[0]} failed before"
            case.not_run[f"{contestant.name} as a CUDA graph"] = why
            continue
        try:
            graphs[contestant.name] = [_capture(contestant, case.spec.direction, inputs) for inputs in case.sets]
        except RuntimeError as error:
            case.not_run[f"{contestant.name} as a CUDA graph"] = str(error).splitlines()[0][:160]
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for i in range(rounds):
        for j, (name, captured) in enumerate(graphs.items()):  # nobody finds the inputs that another has just read
            times[name].append(replay_seconds(captured[(i + j) % len(captured)]))
    return times


def _capture(contestant: Contestant, direction: str, inputs: Inputs) -> torch.cuda.CUDAGraph:
    return captured(lambda: prepare(contestant, direction, inputs)(), contestant.name)[0]


def captured(job: Callable[[], Any], name: str = "ours") -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of job, warmed up on a side stream, and what job returned while it was captured.

    What fails while it is captured is kept in FAILED_CAPTURES by its name, and raised.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):
            job()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = job()
    except Exception:
        FAILED_CAPTURES.append(name)
        torch.cuda.set_stream(current)  # torch.cuda.graph has stayed on its own
        raise
    return graph, result


def measure(benchmark, case: Case, roofline: Roofline) -> dict[str, Any]:
    """Everything about one row, also as the benchmark's ``extra_info``. Raises WrongResult, before any timing."""
    error = gate(case)
    same = same_bits(case)
    if case.ours.deterministic and not same:
        raise WrongResult(f"{case.op} {case.spec}: {REPEATS} runs on the same inputs differ")
    contestants, inputs = [case.ours, *admit(case)], case.sets[0]
    times = race(benchmark, contestants, case)
    median = {name: statistics.median(t) for name, t in times.items()} | case.fixed
    memory = {c.name: peak_bytes(prepare(c, case.spec.direction, inputs), inputs["cuda"]) for c in contestants}
    row = describe(case, median, memory, roofline) | {
        "rounds": len(times["ours"]),
        "max_error": error,
        "tolerance": TOLERANCE[case.spec.dtype] * case.slack,
        "deterministic": same,
        "spread_s": {name: spread(t) for name, t in times.items()},
    }
    # a graph of a backward pass needs its forward too
    if inputs["cuda"] and case.graphs and case.spec.direction != "backward":
        replays = graph_times(contestants, case)
        row["graph_s"] = {name: statistics.median(t) for name, t in replays.items()}
        row["graph_spread_s"] = {name: spread(t) for name, t in replays.items()}
        row["not_run"] = dict(case.not_run)
    benchmark.group = case.op
    benchmark.extra_info.update(row)
    return row


def spread(times: list[float]) -> list[float]:
    """The 20th and the 80th percentile."""
    return [float(torch.tensor(times, dtype=torch.float64).quantile(q)) for q in (0.2, 0.8)]


def describe(case: Case, median: dict[str, float], memory: dict[str, int], roofline: Roofline) -> dict[str, Any]:
    """The row's figures: times, ratios (above 1: ours is faster), memory and share of the roofline."""
    peers = {name: t for name, t in median.items() if name != "ours"}
    best = min(peers, key=peers.__getitem__) if peers else None
    spec, ours = case.spec, median["ours"]
    return {
        "op": case.op,
        "shape": f"B={spec.batch} N={spec.n} K={spec.k} W={spec.width}",
        "batch": spec.batch,
        "n": spec.n,
        "k": spec.k,
        "width": spec.width,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "distribution": spec.distribution,
        "storage": spec.storage,
        "direction": spec.direction,
        "device": "cuda" if case.sets[0]["cuda"] else "cpu",
        "ours_s": ours,
        "peers_s": peers,
        "ratios": {name: t / ours for name, t in peers.items()},
        "best_peer": best,
        "ratio": None if best is None else peers[best] / ours,
        "memory_bytes": memory,
        "memory_ratio": memory[best] / max(memory["ours"], 1) if best in memory else None,
        "bytes": case.bytes_moved,
        "flops": case.flops,
        "roofline": roofline.least_seconds(case.bytes_moved, case.flops, spec.dtype) / ours,
        "not_run": dict(case.not_run),
        "notes": list(case.notes),
    }
