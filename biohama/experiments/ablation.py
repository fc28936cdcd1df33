"""What each part is worth: BioHama with one part taken out, on the tasks that may need it, beside the whole.

    python -m biohama.experiments.ablation out=runs/ablation seeds=[0,1,2] jobs=2

Runs each of CASES for every seed, seed after seed, as ``suite`` does: the same command again finishes what is missing.
Writes OUT/ablation.json and ablation.md: medians and minima over the seeds. Options of a run go to every run.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sprout.runs import replace_file

from ..config import MODULES
from .config import FOUR, Config, OptionError, check, planned
from .evaluate import accuracy
from .suite import placed, run

log = logging.getLogger("biohama.experiments")


class Case(NamedTuple):
    """A part, by name; model and train, the options that take it out; the tasks on which that is tried."""

    name: str
    tasks: Sequence[str]
    model: Mapping[str, Any] = {}
    train: Mapping[str, Any] = {}


def _lacking(*names: str) -> dict[str, Any]:
    return {"modules": [name for name in MODULES if name not in names]}


WHOLE = Case("the whole", [*FOUR, "all_four"])
CASES = (
    WHOLE,
    Case("hebb", ["recall"], _lacking("hebb")),
    Case("compete", ["sort"], _lacking("compete")),
    Case("forward", ["copy"], _lacking("forward")),
    Case("forward, hebb", ["copy"], _lacking("forward", "hebb")),
    Case("backward", ["reverse"], _lacking("backward")),
    Case("backward, newest", ["reverse"], _lacking("backward", "newest")),
    Case("messages", FOUR, {"n_rounds": 0}),
    Case("sparse router", ["reverse", "sort"], {"threshold": 0.0}),
    Case("sparse reads", ["sort"], {"read_width": 0}),
    Case("winner takes all", ["sort"], {"winner_take_all": False}),
    Case("tied cue", ["sort", "recall"], {"tied_cue": False}),
    Case("inhibition of return", ["sort"], {"inhibition": False}),
    Case("loss of each module", ["sort"], train={"without": ["modules"]}),
    Case("responsibility", ["sort", "all_four"], train={"without": ["responsibility"]}),
    Case("credit of the router", ["sort", "all_four"], train={"without": ["credit"]}),
    Case("exploration", ["sort"], train={"without": ["exploration"]}),
    Case("price of events", ["reverse"], train={"without": ["rest"]}),
    Case("price of own", ["sort", "all_four"], train={"without": ["quiet"]}),
    Case(
        "responsibility, credit, price of own",
        ["all_four"],
        train={"without": ["responsibility", "credit", "quiet"]},
    ),
)
STEPS = {"all_four": 3000}  # where they are not the default


@dataclass
class Ablation:
    """out: folder. cases: names out of CASES, null: all. tasks: those of them to run, null: all. model: a BioHama.

    seeds. jobs: processes at once. options: of every run, nested, see ``make_config``. Raises: OptionError.
    """

    out: str
    cases: list[str] | None = None
    tasks: list[str] | None = None
    model: str = "biohama_tiny"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    jobs: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [case.name for case in CASES]
        check("cases", self.cases, lambda x: x is None or set(x) <= set(known), f"names out of {known}, or null")
        check("tasks", self.tasks, lambda x: x is None or set(x) <= set(WHOLE.tasks), f"out of {WHOLE.tasks}, or null")
        check("model", self.model, lambda x: x in ("biohama", "biohama_tiny"), "biohama or biohama_tiny")
        check("seeds", self.seeds, lambda x: isinstance(x, list) and len(x) > 0, "a list like [0,1], not empty")
        check("jobs", self.jobs, lambda x: type(x) is int and x >= 1, "an integer >= 1")
        for name in ("model", "task", "seed"):
            if name in self.options:
                raise OptionError(f"{name} cannot be given to every run: the runs differ in it")

    def runs(self) -> list[tuple[Case, str, Config]]:
        """(case, task, run), seed after seed. Raises: OptionError."""
        found = []
        for seed in self.seeds:
            for case in CASES:
                for task in case.tasks:
                    if case.name in (self.cases or [case.name]) and task in (self.tasks or [task]):
                        found.append((case, task, self._config(case, task, seed)))
        return found

    def _config(self, case: Case, task: str, seed: int) -> Config:
        steps = {"steps": STEPS[task]} if task in STEPS else {}
        train = {**steps, **case.train, **self.options.get("train", {})}
        model = {"name": self.model, **case.model}
        return placed(self.out, {**self.options, "task": task, "model": model, "train": train, "seed": seed})


def collected(runs: Sequence[tuple[Case, str, Config]]) -> list[dict[str, Any]]:
    """A row for each case and task of which some runs are finished: Seq-Acc by split, one value for each seed.

    In free running; with evaluation.free_running=0 teacher-forced, see ``accuracy``.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for case, task, config in runs:
        file = Path(str(config.out)) / "results.json"
        if file.exists():
            empty = {"removed": case.name, "task": task, "seeds": [], "seq_acc": {}}
            row = rows.setdefault((case.name, task), empty)
            row["seeds"].append(config.seed)
            for split, figures in json.loads(file.read_text())["splits"].items():
                row["seq_acc"].setdefault(split, []).append(accuracy(figures))
    return list(rows.values())


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, task after task, the whole first."""
    splits = list(dict.fromkeys(split for row in rows for split in row["seq_acc"]))
    lines = ["# BioHama without one of its parts", "", "Seq-Acc, median over the seeds (minimum).", ""]
    lines += [f"| task | without | seeds | {' | '.join(splits)} |", "|" + "---|" * (len(splits) + 3)]
    for row in sorted(rows, key=lambda row: WHOLE.tasks.index(row["task"])):
        values = [row["seq_acc"].get(split) for split in splits]
        cells = ["-" if not v else f"{median(v):.3f} ({min(v):.3f})" for v in values]
        name = "(nothing)" if row["removed"] == WHOLE.name else row["removed"]
        lines.append(f"| {row['task']} | {name} | {len(row['seeds'])} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns: the exit code, as ``suite``."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        plan = planned(Ablation, sys.argv[1:] if argv is None else argv)
        runs = plan.runs()
    except (ValueError, TypeError) as error:
        print(f"biohama.experiments.ablation: error: {error}", file=sys.stderr)
        return 2
    code = run([config for _, _, config in runs], plan.jobs)
    rows = collected(runs)
    if rows:
        replace_file(Path(plan.out) / "ablation.json", json.dumps(rows, indent=1))
        replace_file(Path(plan.out) / "ablation.md", markdown(rows))
    return code


if __name__ == "__main__":
    sys.exit(main())
