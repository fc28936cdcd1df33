"""Tables and plots of recorded runs: ``python -m benchmarks.report FILE... [--plots DIR] [--readme README.md]``.

FILE is what ``pytest benchmarks/ --benchmark-only --benchmark-json=FILE`` wrote. The tables go to the standard output
as Markdown; with --readme the table of the first FILE replaces what stands between the two markers in that file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from . import table

BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"
Run = dict[str, Any]


def load(path: Path) -> Run:
    """A recorded run. Raises: SystemExit with a message if the file is not one."""
    try:
        run = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: not a file of --benchmark-json ({type(error).__name__}: {error})") from None
    if not (isinstance(run, dict) and {"benchmarks", "machine_info"} <= run.keys()):
        raise SystemExit(f"{path}: not a file of --benchmark-json (no benchmarks, or no machine_info)")
    return run


def rows_of(run: Run) -> list[table.Row]:
    """The rows that compare operations; what only checks a target has no direction."""
    return [b["extra_info"] for b in run["benchmarks"] if "direction" in b["extra_info"]]


def targets_of(run: Run) -> list[table.Row]:
    return [entry for b in run["benchmarks"] for entry in b["extra_info"].get("targets", [])]


def scaling_of(run: Run) -> list[table.Row]:
    """What a step of SPROUT costs as its pool grows, one row for each number of neurons."""
    return [point for b in run["benchmarks"] for point in b["extra_info"].get("scaling", [])]


def where(run: Run) -> str:
    """The machine and the software, in one line."""
    machine, commit = run["machine_info"], run.get("commit_info") or {}
    backend = machine.get("backend", {})
    parts = [
        machine.get("device") or "unknown device",
        f"{machine.get('threads', '?')} CPU thread(s)",
        f"torch {backend.get('torch', '?')}",
        f"triton {backend.get('triton') or 'not installed'}",
        f"commit {str(commit.get('id', 'unknown'))[:10]}" + (" with changes" if commit.get("dirty") else ""),
        str(run.get("datetime", ""))[:10],
    ]
    return ", ".join(parts)


def markdown(run: Run) -> list[str]:
    """The machine, all rows, their summary and the targets, as Markdown."""
    rows, scaling = rows_of(run), scaling_of(run)
    lines = [f"Measured on {where(run)}.", ""]
    if not rows and not scaling:
        return [*lines, "Nothing was compared in this run."]
    if rows:
        lines += [*table.markdown(rows), "", *[f"- {line}" for line in table.summary_lines(rows)]]
    if scaling:
        lines += ["", "SPROUT in groups, as the pool grows:", "", *table.scaling_markdown(scaling), ""][not rows :]
    return lines + [f"- {table.target_line(entry)}" for entry in targets_of(run)]


def rewrite(readme: Path, lines: list[str]) -> None:
    """Puts the lines between the markers of the file. Raises: SystemExit if it does not hold both, once, in order."""
    text = readme.read_text(encoding="utf8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{readme}: needs one line {BEGIN} and after it one line {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after, encoding="utf8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and plots of runs.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by --benchmark-json")
    parser.add_argument("--readme", type=Path, help="rewrite the table between the two markers in this file")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots there (needs matplotlib)")
    options = parser.parse_args(arguments)
    runs = [load(path) for path in options.files]
    for path, run in zip(options.files, runs, strict=True):
        print(f"## {path.name}\n")
        print("\n".join(markdown(run)), end="\n\n")
    if options.readme:
        rewrite(options.readme, markdown(runs[0]))
        print(f"{options.readme}: table rewritten", file=sys.stderr)
    if options.plots:
        if importlib.util.find_spec("matplotlib") is None:
            raise SystemExit('--plots needs matplotlib: pip install "bio-kernels[all]", or pip install matplotlib')
        from . import plots

        pictures = plots.draw([row for run in runs for row in rows_of(run)], options.plots)
        pictures += plots.draw_scaling([point for run in runs for point in scaling_of(run)], options.plots)
        for written in pictures:
            print(written, file=sys.stderr)


if __name__ == "__main__":
    main()
