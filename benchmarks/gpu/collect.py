"""The files of the steps as one run in the form of --benchmark-json, which report.py reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .journal import OK, Row
from .setting import ROOT, commit

# Steps whose rows are times and targets; the others go along whole.
RACES = ("suite", "targets", "model", "million", "language")
RESULTS = ROOT / "benchmarks" / "results"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The steps in DIR by name. Raises: SystemExit if there are none, or if one is a rehearsal."""
    steps = {path.stem: json.loads(path.read_text(encoding="utf8")) for path in sorted(folder.glob("*.json"))}
    if not steps:
        raise SystemExit(f"{folder}: no results there")
    rehearsed = [name for name, step in steps.items() if step["rehearsal"]]
    if rehearsed:
        raise SystemExit(f"{folder}: {', '.join(rehearsed)} rehearsed without a GPU: those are no results")
    return steps


def run_of(steps: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Raises: SystemExit if the step environment, which names the machine, is not among them."""
    try:
        machine = steps["environment"]["rows"]["machine"]
        info, when = machine["machine_info"], machine["datetime"]
    except KeyError:
        raise SystemExit("the step environment is missing: without it nobody knows what was measured") from None
    info = info | {"roofline": steps["environment"]["rows"].get("ceilings", {}).get("roofline", {})}
    benchmarks = []
    for name in RACES:
        for key, row in steps.get(name, {}).get("rows", {}).items():
            if row["status"] == OK and ("direction" in row or "targets" in row):
                entry = {"group": row.get("op", name), "name": f"{name}: {key}", "fullname": f"{name}::{key}"}
                benchmarks.append(entry | {"params": None, "extra_info": without_repeats(name, row)})
    others = {name: step for name, step in steps.items() if name not in RACES}
    named = machine.get("commit_info") or commit()  # a copy without its git folder does not know
    return {
        "machine_info": info | {"packages": machine.get("packages", {})},
        "commit_info": named,
        "benchmarks": benchmarks,
        "datetime": when,
        "version": "on_gpu",
        "steps": others | {name: steps[name] for name in RACES if name in steps and name not in ("suite", "targets")},
    }


def without_repeats(step: str, row: Row) -> Row:
    """The row; of the step targets without its direction, for the suite has most of its rows too."""
    return {name: value for name, value in row.items() if not (step == "targets" and name == "direction")}


def write(folder: Path, results: Path = RESULTS) -> Path:
    """benchmarks/results/<device>-<date>.json from the files in DIR. Raises: SystemExit, see read and run_of."""
    run = run_of(read(folder))
    device = re.sub(r"[^a-z0-9]+", "-", str(run["machine_info"]["device"]).lower()).strip("-")
    path = results / f"{device}-{run['datetime'][:10]}.json"
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1, default=str) + "\n", encoding="utf8")
    return path
