"""Plots of recorded rows: speed against N, K and B, and each row under the roofline."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

from .table import Row

VARIED = ("batch", "n", "k", "width", "dtype", "distribution", "storage", "direction")
AXES = {"n": "neurons in the pool N", "k": "active neurons K", "batch": "batch B"}


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """One picture for each operation and axis along which something was measured, and one roofline; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op in dict.fromkeys(row["op"] for row in rows):
        for axis in AXES:
            lines = series([row for row in rows if row["op"] == op], axis)
            if lines:
                written.append(_speed(lines, op, axis, folder))
    if rows:
        written.append(_roofline(rows, folder))
    return written


def series(rows: list[Row], axis: str) -> dict[str, list[tuple[int, float, float | None]]]:
    """label -> (place on the axis, ours, best peer) of rows that differ in nothing else, if there are at least two."""
    fixed = [name for name in VARIED if name != axis]
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        # the connection matrix has as many columns as neurons: along N its width grows with it
        same = [row[name] if name != "width" or row["width"] != row["n"] else "N" for name in fixed]
        groups[tuple(same)].append(row)
    lines = {}
    for key, members in groups.items():
        if len({row[axis] for row in members}) > 1:
            points = [(row[axis], row["ours_s"], row["peers_s"].get(row["best_peer"])) for row in members]
            lines[" ".join(f"{name}={value}" for name, value in zip(fixed, key, strict=True))] = sorted(points)
    return lines


def _speed(lines: dict[str, list[tuple[int, float, float | None]]], op: str, axis: str, folder: Path) -> Path:
    figure = Figure(figsize=(8, 5))
    plot = figure.subplots()
    for label, points in lines.items():
        (drawn,) = plot.plot([p[0] for p in points], [p[1] * 1e3 for p in points], "o-", label=label)
        peer = [(p[0], p[2] * 1e3) for p in points if p[2] is not None]
        plot.plot([x for x, _ in peer], [y for _, y in peer], "x--", color=drawn.get_color())
    plot.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel="milliseconds", title=f"{op} (dashed: best peer)")
    plot.legend(fontsize=6)
    return _save(figure, folder / f"{op}-{axis}.png")


def _roofline(rows: list[Row], folder: Path) -> Path:
    """Achieved FLOPs a second against FLOPs a byte; a row's share of the roofline is in the table."""
    figure = Figure(figsize=(8, 5))
    plot = figure.subplots()
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op and row["flops"]]
        intensity = [row["flops"] / row["bytes"] for row in own]
        plot.plot(intensity, [row["flops"] / row["ours_s"] / 1e9 for row in own], "o", label=op)
        at_best = [row["flops"] / (row["ours_s"] * row["roofline"]) / 1e9 for row in own]
        plot.plot(intensity, at_best, "_", color="grey")
    plot.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s")
    plot.set_title("grey: what this machine allows")
    plot.legend(fontsize=7)
    return _save(figure, folder / "roofline.png")


def draw_scaling(points: list[Row], folder: Path) -> list[Path]:
    """Time and peak memory of a step of SPROUT against the neurons in its pool; the picture's path, if there is one."""
    if not points:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    points = sorted(points, key=lambda point: point["n"])
    figure = Figure(figsize=(8, 5))
    plot = figure.subplots()
    for key, label in (("step_s", "training step"), ("forward_s", "forward")):
        plot.plot([p["n"] for p in points], [p[key] * 1e3 for p in points], "o-", label=label)
    plot.set(xscale="log", xlabel=AXES["n"], ylabel="milliseconds", ylim=(0, None), title="SPROUT in groups")
    memory = plot.twinx()
    memory.plot([p["n"] for p in points], [p["peak_bytes"] / 2**30 for p in points], "x--k", label="peak memory")
    memory.set(ylabel="peak memory, GiB", yscale="log")
    plot.legend(fontsize=7, loc="center left")
    memory.legend(fontsize=7, loc="lower right")
    return [_save(figure, folder / "sprout-scaling.png")]


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path
