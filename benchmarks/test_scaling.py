"""SPROUT in groups as its pool grows at the same number of active neurons (target P5): time and memory of a step."""

from __future__ import annotations

from typing import Any

import pytest

from . import child_scaling, memory

POOLS = (4096, 65_536, 1_048_576)
WIDTH, GROUPS, STEPS = 256, 32, 5


def needed_bytes(n_neurons: int) -> int:
    """Of a training process: two tables of signatures, the stored blocks, twice that for the optimizer's states."""
    row = 2 * WIDTH + child_scaling.SIZES["blocks_per_row"] * child_scaling.SIZES["block_size"]
    return 3 * 4 * n_neurons * row + 2**30


def in_child(n_neurons: int, threads: int) -> dict[str, Any]:
    args = (str(n_neurons), str(WIDTH), str(GROUPS), str(STEPS))
    return memory.in_child("benchmarks.child_scaling", *args, threads=threads, timeout=900)


def test_a_step_does_not_cost_what_the_pool_does(benchmark, session, check_target) -> None:
    """Forward and training step of one configuration, each pool in a process of its own."""
    if session.cuda:
        pytest.skip("targets of the CPU path")
    pools = POOLS[:2] if session.short else POOLS
    available = memory.available_bytes()
    pools = tuple(n for n in pools if available > 1.2 * needed_bytes(n))
    if len(pools) < 2:
        need = 1.2 * needed_bytes(POOLS[1]) / 2**30
        pytest.skip(f"N = {POOLS[1]:,} needs {need:.1f} GiB of free memory, there are {available / 2**30:.1f}")
    points: list[dict[str, Any]] = []
    benchmark.group = "SPROUT in groups, as the pool grows"
    benchmark.pedantic(lambda: points.extend(in_child(n, session.threads) for n in pools), rounds=1)
    benchmark.extra_info.update({"op": "sprout scaling", "scaling": points, "left_out": list(POOLS[len(pools) :])})
    for what, key in (("training step", "step_s"), ("forward", "forward_s")):
        ratio = max(point[key] / points[0][key] for point in points)
        sizes = f"B={child_scaling.BATCH} D={WIDTH} {GROUPS} groups"
        check_target("P5", f"{what}, {sizes}, N={pools[-1]:,} against N={pools[0]:,}", ratio, 1.5, at_least=False)
