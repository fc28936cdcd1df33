"""Tables and pictures of finished runs: ``python -m biohama.experiments.report RUNS... --out DIR``.

RUNS are run folders or folders that hold some. Writes DIR/report.md, report.json, report.csv and DIR/pictures: medians
and minima over the seeds, by task, model and split; runs that differ in an option besides the seed are told apart.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sprout.runs import CheckpointError, RunError, replace_file

from ..generation import free_run
from ..tasks import Batch
from .build import load_run
from .evaluate import split_generator, trimmed
from .table import acceptance, markdown

log = logging.getLogger("biohama.experiments")
METRICS = ("seq_acc", "seq_acc_teacher_forced", "token_acc", "perplexity")
CANDIDATES = 51  # sequences, of whose median length the one in the picture is


class ReportError(ValueError):
    """There is nothing to report, or a result cannot be read; the message names it."""


def read_results(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The results of every finished run in or below paths, with "path" and "label". Raises: ReportError."""
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        found = [path / "results.json"] if (path / "results.json").exists() else sorted(path.rglob("results.json"))
        if not found:
            raise ReportError(f"{path} holds no finished run (no results.json in it or below)")
        files |= {file.resolve(): None for file in found}
    runs = []
    for file in files:
        try:
            run = json.loads(file.read_text(encoding="utf8"))
            runs.append({key: run[key] for key in _KEYS} | {"path": str(file.parent)})
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{file} is damaged: {error!r}") from None
    label(runs)
    return runs


_KEYS = ("task", "model", "changes", "seed", "parameters", "steps", "train_seconds", "splits")


def label(runs: list[dict[str, Any]]) -> None:
    """Gives each run a "label": its model, and the options in which runs of this task and model differ."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["model"]), []).append(run)
    for (_, model), group in groups.items():
        keys = sorted({key for run in group for key in run["changes"]})
        differing = [key for key in keys if len({json.dumps(run["changes"].get(key)) for run in group}) > 1]
        for run in group:
            own = [f"{key}={run['changes'][key]}" for key in differing if key in run["changes"]]
            run["label"] = " ".join([model, *own])


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task, label and split: medians and minima over the seeds (of perplexity the maximum).

    Raises: ReportError if a seed comes twice.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for split in run["splits"]:
            groups.setdefault((run["task"], run["label"], split), []).append(run)
    found = []
    for (task, name, split), group in groups.items():
        seeds = [run["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            raise ReportError(f"{task}, {name}: the seeds {sorted(seeds)} come more than once; leave out a folder")
        row: dict[str, Any] = {"task": task, "model": name, "split": split, "seeds": sorted(seeds)}
        for key in ("parameters", "steps", "train_seconds"):
            row[key] = median(run[key] for run in group)
        row["sequences"] = sum(run["splits"][split]["sequences"] for run in group)
        for metric in METRICS:
            values = [run["splits"][split][metric] for run in group]
            known = None not in values
            worst = max if metric == "perplexity" else min
            row[metric], row[f"{metric}_worst"] = (median(values), worst(values)) if known else (None, None)
        found.append(row)
    return found


def as_csv(table: list[dict[str, Any]]) -> str:
    """The rows as CSV; seeds separated by blanks."""
    text = StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "seeds": " ".join(map(str, row["seeds"]))} for row in table)
    return text.getvalue()


def draw_lengths(runs: list[dict[str, Any]], out: Path) -> list[Path]:
    """A picture of Seq-Acc by length for each task."""
    from .plot import accuracy_by_length, write

    files = []
    for task in dict.fromkeys(run["task"] for run in runs):
        curves: dict[str, dict[str, list[list[int]]]] = {}
        for run in (run for run in runs if run["task"] == task):
            for split, figures in run["splits"].items():
                curves.setdefault(run["label"], {}).setdefault(split, []).extend(figures["by_length"])
        curves = {name: splits for name, splits in curves.items() if set(splits) - {"train"}}
        seen = [row[0] for splits in curves.values() for row in splits.get("train", [])]
        if curves:
            figure = accuracy_by_length(curves, task, (min(seen), max(seen)) if seen else None)
            files += write(figure, out / f"{task}-by-length")
    return files


def draw_streams(runs: list[dict[str, Any]], out: Path) -> list[Path]:
    """For each task and BioHama one sequence: what the router chose and the memory read; of the lowest seed's model."""
    files, drawn = [], set()
    for run in sorted(runs, key=lambda run: run["seed"]):
        key = (run["task"], run["label"])
        if key in drawn or not run["model"].startswith("biohama"):
            continue
        drawn.add(key)
        try:
            files += _draw_stream(run, out)
        except (CheckpointError, RunError) as error:
            log.warning("no picture of %s: %s", run["path"], error)
    return files


def _draw_stream(run: dict[str, Any], out: Path) -> list[Path]:
    from .plot import stream, write

    _, task, model = load_run(run["path"])
    split = "id" if "id" in task.splits else "train"
    many = Batch(*task.sample(split, CANDIDATES, split_generator(0, "picture")))
    chosen = int(many.scored().sum(1).argsort(stable=True)[CANDIDATES // 2])
    batch = trimmed(Batch(*(tensor[chosen : chosen + 1] for tensor in many)))
    said = free_run(model, batch)  # type: ignore[arg-type]
    tokens = batch.tokens.clone()
    tokens[:, 1:] = torch.where(batch.given[:, 1:], tokens[:, 1:], said[:, :-1])
    with torch.no_grad():
        trace: Any = model.trace(tokens)  # type: ignore[operator]
    answers = []
    for asked, pred, target in zip(
        batch.scored()[0].tolist(), said[0].tolist(), batch.targets[0].tolist(), strict=True
    ):
        name = task.describe([pred])[0]
        wrong = f"{name}\n({task.describe([target])[0]})" if asked and pred != target else name
        answers.append(wrong if asked else "")
    figure = stream(
        f"{run['task']}, {run['label']}, seed {run['seed']}: one sequence of the split {split!r}, in free running",
        task.describe(tokens[0]),
        answers,
        trace.router[0].numpy(),
        trace.names,
        trace.address[0].numpy(),
    )
    name = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in f"{run['task']}-{run['label']}-stream")
    return write(figure, out / name)


def write_report(paths: Sequence[str | Path], out: str | Path, *, pictures: bool = True) -> Path:
    """Writes the report of the runs in or below paths into the folder out. Returns: DIR/report.md.

    Raises: ReportError; ImportError without matplotlib, if pictures; DiskError.
    """
    out, runs = Path(out), read_results(paths)
    table = rows(runs)
    out.mkdir(parents=True, exist_ok=True)
    files = [*draw_lengths(runs, out / "pictures"), *draw_streams(runs, out / "pictures")] if pictures else []
    shown = [file.relative_to(out) for file in files if file.suffix == ".png"]
    whole = {"rows": table, "acceptance": acceptance(table), "runs": [run["path"] for run in runs]}
    replace_file(out / "report.json", json.dumps(whole, indent=1))
    replace_file(out / "report.csv", as_csv(table))
    replace_file(out / "report.md", markdown(table, shown))
    return out / "report.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns: the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(
        prog="python -m biohama.experiments.report", description="Report of finished runs."
    )
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("--out", required=True, help="folder of the report")
    parser.add_argument("--no-pictures", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.runs, arguments.out, pictures=not arguments.no_pictures))
    except (ReportError, ImportError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
