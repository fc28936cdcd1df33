"""Many runs, a few at a time: every task x model x seed, each in a process of its own.

    python -m biohama.experiments.suite out=runs/grid tasks=[copy,sort] models=[biohama,lstm] seeds=[0,1,2] jobs=2

Every other option (train.steps=1200, model.threshold=0) goes to every run. A run with results is left alone, one that
was cut off goes on where it was: the same command again finishes what is missing. SIGINT and SIGTERM let the running
ones save. Exit code 0; 1 if a run failed, the others are done nevertheless; 2 for a wrong option; 130 or 143.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from sprout.runs import Interrupt

from .build import build_model, build_task
from .config import FOUR, Config, check, make_config, of_a_run, planned, run_name
from .evaluate import headline

log = logging.getLogger("biohama.experiments")
WORK = "from biohama.experiments.suite import work; work()"


@dataclass
class Suite:
    """A grid. out: the folder of the runs' folders; jobs: processes at once, each with options["threads"] or 1."""

    out: str
    tasks: list[Any] = field(default_factory=lambda: list(FOUR))
    models: list[Any] = field(default_factory=lambda: ["biohama"])
    seeds: list[int] = field(default_factory=lambda: [0])
    jobs: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tasks", "models", "seeds"):
            check(
                name, getattr(self, name), lambda x: isinstance(x, list) and len(x) > 0, "a list like [a,b], not empty"
            )
        check("jobs", self.jobs, lambda x: type(x) is int and x >= 1, "an integer >= 1")

    def configs(self) -> list[Config]:
        """Every run, seed after seed, so that an early end leaves whole comparisons. Raises: OptionError."""
        found = []
        for seed, task, model in product(self.seeds, self.tasks, self.models):
            choice = {"task": _with(task, self.options.get("task")), "model": _with(model, self.options.get("model"))}
            found.append(placed(self.out, {**self.options, **choice, "seed": seed}))
        return list({config.out: config for config in found}.values())


def placed(out: str, options: Mapping[str, Any]) -> Config:
    """A run with one thread, if options do not say otherwise, in a folder below out. Raises: OptionError."""
    config = make_config({"threads": 1, **options})
    build_model(config.model, build_task(config.task).vocab_size)
    config.out = str(Path(out) / run_name(config))
    return config


def _with(name: Any, options: Any) -> Any:
    return {"name": name, **options} if isinstance(options, Mapping) else name


def work() -> None:
    """One run of a suite, its options as JSON in the first argument."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from .train import train_one

    train_one(json.loads(sys.argv[1]), resume=True)


def start(config: Config) -> subprocess.Popen[bytes]:
    """The process of a run; what it says goes to RUN.log. A session of its own keeps a Ctrl-C of ours from it."""
    options = {**of_a_run(config), "out": config.out, "force": config.force}
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads)}
    Path(f"{config.out}.log").parent.mkdir(parents=True, exist_ok=True)
    with open(f"{config.out}.log", "ab") as file:
        command = [sys.executable, "-c", WORK, json.dumps(options)]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def run(configs: Sequence[Config], jobs: int) -> int:
    """Runs what is missing, jobs at once. Returns: the exit code."""
    todo = [config for config in configs if not (Path(str(config.out)) / "results.json").exists()]
    log.info("%d runs, %d of them are done", len(configs), len(configs) - len(todo))
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed, told = [], False
    with Interrupt() as stop:
        while running or (todo and not stop.signal):
            while todo and len(running) < jobs and not stop.signal:
                config = todo.pop(0)
                running[str(config.out)] = start(config)
            if stop.signal and not told:
                told = True
                for process in running.values():
                    process.send_signal(stop.signal)
            for out in [out for out, process in running.items() if process.poll() is not None]:
                code = running.pop(out).returncode
                _tell(out, code)
                failed += [out] if code and not told else []
            time.sleep(0.1)
        if stop.signal:
            return stop.exit_code
    return 1 if failed else 0


def _tell(out: str, code: int) -> None:
    if code:
        lines = Path(f"{out}.log").read_text(errors="replace").strip().splitlines()
        log.warning("%s: exit code %d; %s.log ends: %s", out, code, out, lines[-1] if lines else "")
        return
    results = json.loads((Path(out) / "results.json").read_text())
    log.info("%s: %.0f s  %s", out, results["train_seconds"], headline(results["splits"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns: the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        suite = planned(Suite, sys.argv[1:] if argv is None else argv)
        configs = suite.configs()
    except (ValueError, TypeError) as error:
        print(f"biohama.experiments.suite: error: {error}", file=sys.stderr)
        return 2
    return run(configs, suite.jobs)


if __name__ == "__main__":
    sys.exit(main())
