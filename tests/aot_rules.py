"""What an ahead-of-time compiled kernel must satisfy, and the baseline its figures are compared with.

Needs neither Triton nor torch. A row is named "arch | kernel | case"; its figures are those of tests/aot.py. The
absolute rules hold for every row. Registers, instructions and load width are compared with the baseline only if the
installed Triton wrote it: another compiler may spend them differently without our code having changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BASELINE = Path(__file__).with_name("aot_baseline.json")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TENSOR_MEMORY_LIMIT = 512  # columns of a multiprocessor's tensor memory, sm_100
NO_SPILL = ("sm_90", "sm_100")
GROWTH = 1.10
SLACK = {"registers": 4, "instructions": 16}  # steps in which a compiler moves without anything having changed

EXCEPTIONS: dict[str, tuple[int, str]] = {}  # row -> (spill bytes allowed, reason)

_LEFT_OUT = ("narrow", "large", "seconds")  # of a row's figures, in the baseline


def read_baseline() -> dict[str, Any]:
    return json.loads(BASELINE.read_text()) if BASELINE.exists() else {"triton": None, "rows": {}}


def write_baseline(report: dict[str, Any]) -> None:
    """One line per row, in order of their names, so that a change reads well in a diff."""
    lines = []
    for name, row in sorted(report["rows"].items()):
        kept = {key: figure for key, figure in row.items() if key not in _LEFT_OUT}
        lines.append(f"  {json.dumps(name)}: {json.dumps(kept)}")
    body = ",\n".join(lines)
    BASELINE.write_text(f'{{"triton": {json.dumps(report["triton"])}, "rows": {{\n{body}\n}}}}\n')


def _absolute(name: str, row: dict[str, Any]) -> list[str]:
    arch = name.split(" | ")[0]
    allowed = EXCEPTIONS.get(name, (0, ""))[0]
    found = []
    if arch in NO_SPILL and row["spill"] > allowed:
        found.append(f"spills {row['spill']} bytes, allowed {allowed}")
    if row["shared"] > SHARED_LIMIT[arch]:
        found.append(f"needs {row['shared']} bytes of shared memory, {arch} has {SHARED_LIMIT[arch]}")
    if row["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        found.append(f"needs {row['tensor_memory']} columns of tensor memory of {TENSOR_MEMORY_LIMIT}")
    if row["dots"] and not row["tensor_core"]:
        found.append(f"has {row['dots']} tl.dot and no tensor-core instruction")
    found += [f"wraps in 32 bits on the way to {', '.join(row['large'])}: {line}" for line in row["narrow"]]
    return found


def _relative(row: dict[str, Any], old: dict[str, Any]) -> list[str]:
    found = []
    for key, slack in SLACK.items():
        if row[key] > max(old[key] * GROWTH, old[key] + slack):
            found.append(f"{key} {old[key]} -> {row[key]}")
    if row["kinds"] != old["kinds"]:
        found.append(f"tensor-core instructions {old['kinds'] or 'none'} -> {row['kinds'] or 'none'}")
    if row["load_bits"] < old["load_bits"]:
        found.append(f"widest global load {old['load_bits']} -> {row['load_bits']} bits")
    if row["spill"] > old["spill"]:
        found.append(f"spill {old['spill']} -> {row['spill']} bytes")
    return found


def _selected(report: dict[str, Any], archs: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, row in report["rows"].items():
        if not archs or name.split(" | ")[0] in archs:
            yield name, row


def violations(report: dict[str, Any], *archs: str) -> list[str]:
    """Which rows of a report break an absolute rule, one line for each breach; all architectures if none is named."""
    found = []
    for name, row in _selected(report, archs):
        problems = [f"does not compile: {row['error']}"] if "error" in row else _absolute(name, row)
        found += [f"{name}: {problem}" for problem in problems]
    return found


def regressions(report: dict[str, Any], baseline: dict[str, Any], *archs: str) -> list[str]:
    """Which rows became worse than in the baseline, one line for each figure. Same Triton version on both sides."""
    pairs = [(name, row, baseline["rows"].get(name)) for name, row in _selected(report, archs) if "error" not in row]
    return [f"{name}: {problem}" for name, row, old in pairs if old is not None for problem in _relative(row, old)]


def differences(shipped: dict[str, str], baseline: dict[str, Any]) -> list[str]:
    """Where the baseline and what ships are not the same set of configurations."""
    rows = baseline["rows"]
    missing = [f"{name}: ships, and is not in the baseline" for name in shipped if name not in rows]
    stale = [f"{name}: is in the baseline, and does not ship" for name in rows if name not in shipped]
    changed = [
        f"{name}: the configuration was {rows[name]['config']}, is {config}"
        for name, config in shipped.items()
        if name in rows and rows[name]["config"] != config
    ]
    unused = [f"{name}: is in EXCEPTIONS, and does not ship" for name in EXCEPTIONS if name not in shipped]
    return missing + stale + changed + unused
