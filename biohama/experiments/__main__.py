"""One run, or with -m many, from the command line::

    python -m biohama.experiments task=copy model=biohama seed=0 out=runs/x train.steps=700
    python -m biohama.experiments task=my_module:MyTask task.options.length=5 model=lstm
    python -m biohama.experiments -m task=copy,sort model=gru seed=0,1 out=runs/many
    python -m biohama.experiments resume=runs/x

Hydra reads the options and leaves no files but, with -m, OUT/.hydra/multirun.yaml. What is wrong is said in one line,
with exit code 2 (an unknown key: Hydra's message and 1); a run that fails later ends with 1, one that was interrupted
with 130 or 143 and can be resumed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from sprout.runs import CheckpointError, DiskError, LockError, RunError

from .build import continued
from .config import FREE_ON_RESUME, MODELS, TASK_GROUPS, Config, OptionError, nested, run_name, to_config

DEFAULTS = ["_self_", {"task": "copy"}, {"model": "biohama"}]
QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.run.dir=.")


def register() -> None:
    """Tells Hydra the schema and the groups."""
    store = ConfigStore.instance()
    store.store(name="experiment", node={"defaults": [{"experiment_schema": "base"}, *DEFAULTS]})
    store.store(group="experiment_schema", name="base", node=Config, package="_global_")
    for name, task in TASK_GROUPS.items():
        store.store(group="task", name=name, node=task)
    for name, model in MODELS.items():
        store.store(group="model", name=name, node=model)


def rewritten(argv: Sequence[str]) -> list[str]:
    """The arguments as Hydra takes them: any task by its class, options of a task without a plus, and quiet."""
    result = []
    for argument in argv:
        key, _, value = argument.partition("=")
        if key == "task" and ":" in value:
            result += ["task=custom", f"task.name='{value}'"]
        elif key.startswith("task.options."):
            result.append(f"++{argument}")
        else:
            result.append(argument)
    if {"-m", "--multirun"} & set(argv):
        out = next((a.partition("=")[2] for a in argv if a.startswith("out=")), "runs")
        result += [f"hydra.sweep.dir={out}/.hydra", "hydra.sweep.subdir=."]
    return [*(a for a in result if a.startswith("-")), *QUIET, *(a for a in result if not a.startswith("-"))]


@hydra.main(version_base="1.3", config_path=None, config_name="experiment")
def composed(options: Any) -> None:
    """Runs what Hydra composed."""
    try:
        config = to_config(options)
    except ValueError as error:
        _fail(error, 2)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        config.out = str(Path(config.out or "runs") / run_name(config))
    train(config, resume=False)


def train(config: Config, resume: bool) -> None:
    """One run; ends the process when it fails or is interrupted."""
    try:
        from .train import train_one

        train_one(config, resume=resume)
    except (ValueError, LockError, ImportError) as error:
        _fail(error, 2)
    except (RunError, CheckpointError, DiskError) as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> NoReturn:
    print(f"biohama.experiments: error: {error}", file=sys.stderr)
    raise SystemExit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = list(sys.argv[1:] if argv is None else argv)
    runs = [argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")]
    if runs:
        try:
            given = nested([argument for argument in arguments if not argument.startswith("resume=")])
            config = continued(runs[0], given, FREE_ON_RESUME)
        except (OptionError, RunError) as error:
            _fail(error, 2)
        train(config, resume=True)
        return
    register()
    before = sys.argv
    sys.argv = [before[0], *rewritten(arguments)]
    try:
        composed()
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()
