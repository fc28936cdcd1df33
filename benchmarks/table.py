"""The tables: one line a row, losses shown as losses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
HEADER = ("op", "shape", "dtype", "indices", "matrix", "direction", "ours", "best peer", "ratio", "memory", "roofline")


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def amount(size: float) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.3g} {unit}"
    return f"{size:.0f} B"


def times(ratio: float | None) -> str:
    """A ratio, above 1 in our favour; a loss says so."""
    if ratio is None:
        return "-"
    digits = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
    return f"{digits}x" + (" LOSS" if lost(ratio) else "")


def lost(ratio: float) -> bool:
    """Slower than the peer by what the table shows: 0.995 and more is shown as 1.00."""
    return round(ratio, 2) < 1


def cells(row: Row) -> tuple[str, ...]:
    """The row's figures as text, in the order of HEADER."""
    peer = "none" if row["best_peer"] is None else f"{duration(row['peers_s'][row['best_peer']])} {row['best_peer']}"
    memory = row["memory_ratio"]
    return (
        row["op"],
        row["shape"],
        row["dtype"],
        row["distribution"],
        row["storage"],
        row["direction"],
        duration(row["ours_s"]),
        peer,
        times(row["ratio"]),
        "-" if memory is None else f"{memory:.3g}x",
        f"{row['roofline']:.0%}",
    )


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def summary_lines(rows: list[Row]) -> list[str]:
    """Geometric mean, worst case and number of losses of the rows that had a peer."""
    raced = [row for row in rows if row["ratio"] is not None]
    if not raced:
        return ["no row had a peer"]
    worst = min(raced, key=lambda row: row["ratio"])
    losses = sum(lost(row["ratio"]) for row in raced)
    where = " ".join(cells(worst)[i] for i in (0, 1, 2, 3, 4, 5))
    mean = geometric_mean(row["ratio"] for row in raced)
    return [
        f"geometric mean {mean:.2f}x over {len(raced)} rows, {losses} of them losses",
        f"worst {times(worst['ratio'])}: {where}, against {worst['best_peer']}",
    ]


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def closing_lines(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    return [*aligned([HEADER, *map(cells, rows)]), *summary_lines(rows)]


def markdown(rows: list[Row]) -> list[str]:
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    return lines + ["| " + " | ".join(cells(row)) + " |" for row in rows]


def scaling_markdown(points: list[Row]) -> list[str]:
    """What a step costs as the pool grows: one line for each number of neurons."""
    lines = ["| N | parameters | training step | tokens/s | forward | peak memory |", "|" + "---|" * 6]
    for p in points:
        cells = (f"{p['n']:,}", f"{p['parameters']:,}", duration(p["step_s"]), f"{p['tokens_per_s']:.0f}")
        lines.append("| " + " | ".join((*cells, duration(p["forward_s"]), amount(p["peak_bytes"]))) + " |")
    return lines


def target_line(entry: Row) -> str:
    """What was to be reached, and whether it was."""
    sign, unit = (">=" if entry["at_least"] else "<="), entry["unit"]
    verdict = "reached" if entry["reached"] else "MISSED"
    measured, target = f"{entry['measured']:.3g}{unit}", f"{entry['target']:.3g}{unit}"
    return f"{entry['name']} {verdict}: {measured} (target {sign} {target}) {entry['what']}"


def not_run_lines(rows: list[Row]) -> list[str]:
    """Why peers took no part, each reason once, with the number of rows it holds for; then the notes."""
    reasons: dict[tuple[str, str, str], int] = {}
    for row in rows:
        for peer, why in row["not_run"].items():
            reasons[row["op"], peer, why] = reasons.get((row["op"], peer, why), 0) + 1
    lines = [f"{op}: {peer}: {why} ({count} rows)" for (op, peer, why), count in reasons.items()]
    notes = dict.fromkeys(f"{row['op']}: {note}" for row in rows for note in row["notes"])
    return [*lines, *notes]
