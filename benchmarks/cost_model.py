"""What a training step of SPROUT in groups must cost: bytes and FLOPs as a function of its sizes; docs/scaling.md.

    python -m benchmarks.cost_model FILE          FILE: of --benchmark-json, with the rows of test_scaling.py

prints the floor beside what was measured there, and predictions for larger pools on GPUs of which bandwidth, arithmetic
and memory are given (the options' defaults: an H200's data sheet). float32 throughout.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from . import child_scaling, test_scaling
from .report import load, scaling_of

BASE_BYTES = 0.6 * 2**30  # of a process with torch and the model's other weights, measured at N = 4,096
LINK = 50e9  # bytes a second between two GPUs of different hosts: 400 Gbit/s


class Cost(NamedTuple):
    """Bytes moved through memory, each counted once for every pass that has to be made, and FLOPs."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Sizes:
    """B samples of T tokens, N neurons of width D in groups of P, R stored blocks a block row, A groups for a sample,
    K active neurons, S steps, L encoder layers, V symbols."""

    b: int = child_scaling.BATCH
    t: int = child_scaling.WINDOW
    n: int = 4096
    d: int = test_scaling.WIDTH
    p: int = child_scaling.SIZES["block_size"]
    r: int = child_scaling.SIZES["blocks_per_row"]
    a: int = test_scaling.GROUPS
    k: int = child_scaling.SIZES["final_sparsity"]
    s: int = child_scaling.SIZES["n_interaction_steps"]
    layers: int = 2
    v: int = 256

    @property
    def groups(self) -> int:
        return self.n // self.p

    @property
    def page(self) -> int:
        """Neurons paged in, if no two samples share a group."""
        return min(self.n, self.b * self.a * self.p)

    @property
    def page_blocks(self) -> float:
        """Stored blocks within the page: the diagonal ones, and of the others, at random columns, their share."""
        return self.page / self.p * (1 + (self.r - 1) * self.page / self.n)


def training_step(x: Sizes) -> dict[str, Cost]:
    """The cost of forward, backward and the optimizers, part by part; a backward pass has twice a forward's FLOPs.

    groups: scores of all groups, their dense gradient, AdamW (reads 4, writes 3 numbers for each weight). The only part
        that grows with N.
    page: what is gathered of the tables, scored, and moved by SparseAdam.
    interaction: attention, GRU, look at the tokens, spread; the drive over the page.
    rest: encoder and decoder. plasticity: one synapse for each pair of active neurons, in every pattern.
    """
    table, page, blocks = x.groups * x.d, x.page * x.d, x.page_blocks * x.p**2
    row = x.page_blocks * x.p / x.page * x.p  # synapses of a neuron within the page
    dense = x.k * x.d * (20 * x.d + 4 * x.k + 4 * x.t) + 2 * x.k * row
    encoder = x.layers * (24 * x.t * x.d**2 + 4 * x.t**2 * x.d)
    decoder = 4 * x.k * x.d**2 + 2 * x.d * x.v
    return {
        "groups": Cost(44 * table, 6 * x.b * table),
        "page": Cost(60 * (page + blocks), 6 * x.b * page),
        "interaction": Cost(12 * x.s * x.b * (6 * x.page + 12 * x.k * x.d + 2 * x.k**2), 3 * x.s * x.b * dense),
        "rest": Cost(12 * x.b * 16 * x.layers * x.t * x.d, 3 * x.b * (encoder + decoder)),
        "plasticity": Cost(16 * (x.s + 1) * x.b * x.k**2, 3 * (x.s + 1) * x.b * x.k**2),
    }


def floor_seconds(x: Sizes, bandwidth: float, arithmetic: float) -> float:
    """The least time of a training step: each part waits for its bytes or its FLOPs, whichever takes longer."""
    return sum(max(cost.bytes / bandwidth, cost.flops / arithmetic) for cost in training_step(x).values())


def memory_bytes(x: Sizes) -> float:
    """Weights and two moments of all tables; of the groups also a gradient."""
    return 12 * x.n * (2 * x.d + 1 + x.r * x.p) + 16 * x.groups * (x.d + 1)


def measured_lines(run: dict[str, Any]) -> list[str]:
    """The model beside a recorded run, as Markdown. Raises: SystemExit if it holds no such rows."""
    points, ceiling = scaling_of(run), run["machine_info"]["roofline"]
    if not points:
        raise SystemExit("the file holds no rows of benchmarks/test_scaling.py")
    bandwidth, arithmetic = ceiling["copy_bytes_per_s"], ceiling["matmul_flops_per_s"]["float32"]
    lines = [
        f"Ceilings of that run: {bandwidth / 1e9:.1f} GB/s copied, {arithmetic / 1e9:.0f} GFLOP/s in a matrix product.",
        "",
        "| N | floor | measured | growth, floor | growth, measured | memory, model | memory, measured |",
        "|" + "---|" * 7,
    ]
    first = floor_seconds(Sizes(n=points[0]["n"]), bandwidth, arithmetic)
    for point in points:
        x = Sizes(n=point["n"])
        floor, base = floor_seconds(x, bandwidth, arithmetic), points[0]["step_s"]
        cells = [f"{x.n:,}", f"{floor * 1e3:.0f} ms", f"{point['step_s'] * 1e3:.0f} ms"]
        cells += [f"{(floor - first) * 1e3:+.0f} ms", f"{(point['step_s'] - base) * 1e3:+.0f} ms"]
        cells += [f"{(memory_bytes(x) + BASE_BYTES) / 2**30:.2f} GiB", f"{point['peak_bytes'] / 2**30:.2f} GiB"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def predicted_lines(bandwidth: float, arithmetic: float, memory: float) -> list[str]:
    """Pools on 1, 8 and 64 GPUs, tables and groups spread by rows, B samples each: predictions, as Markdown."""
    lines = ["| GPUs | N | memory of each | floor of a step | of it the groups | exchanged by each |", "|" + "---|" * 6]
    largest = {gpus: int(0.9 * gpus * memory / (memory_bytes(Sizes(n=2**20)) / 2**20)) for gpus in (1, 8, 64)}
    for gpus, n in [(1, 2**20), *largest.items(), (64, 10**9)]:
        x = replace(Sizes(), n=n // 32 * 32)
        parts = training_step(x)
        mine = Cost(parts["groups"].bytes / gpus, parts["groups"].flops)  # every sample against every GPU's groups
        seconds = {
            name: max(c.bytes / bandwidth, c.flops / arithmetic) for name, c in {**parts, "groups": mine}.items()
        }
        sent = 0 if gpus == 1 else 8 * (x.page * x.d + x.page_blocks * x.p**2)  # rows here, their gradients back
        each = memory_bytes(x) / gpus
        cells = [str(gpus), f"{x.n:,}", f"{each / 1e9:.0f} GB" + (" (too much)" if each > memory else "")]
        cells += [f"{(sum(seconds.values()) + sent / LINK) * 1e3:.2f} ms", f"{seconds['groups'] * 1e3:.2f} ms"]
        lines.append("| " + " | ".join([*cells, f"{sent / 1e6:.0f} MB"]) + " |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_model", description="Floors of a step.")
    parser.add_argument("file", type=Path, metavar="FILE", help="written by --benchmark-json")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second of a GPU's memory")
    parser.add_argument("--arithmetic", type=float, default=67e12, help="float32 FLOPs a second of a GPU")
    parser.add_argument("--memory", type=float, default=141e9, help="bytes of a GPU's memory")
    options = parser.parse_args(arguments)
    run = load(options.file)
    print("\n".join([*measured_lines(run), "", "Predictions, nothing of it measured:", ""]))
    print("\n".join(predicted_lines(options.bandwidth, options.arithmetic, options.memory)))


if __name__ == "__main__":
    main()
