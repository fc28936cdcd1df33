"""Tasks learnt one after another: what is kept of the earlier ones, with parts of BioHama taken out and by baselines.

    python -m biohama.experiments.continual out=runs/continual tasks=[copy,reverse,recall] models=[biohama_tiny,lstm]

Each stage is a run of its own, OUT/VARIANT-sSEED/STAGE-TASK, that starts from the last one's weights with a new
optimizer and sees its own task alone. After a stage every task is measured. Variants of a BioHama besides the whole:
"without hebb" lacks the Hebbian memory, "dense router" cuts no weight off and so uses all modules at once.
Writes OUT/continual.json, continual.md and continual.png/.svg; the same command again finishes what is missing.
Any option of a run (train.steps=700, evaluation.sequences=100) goes to every stage.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from sprout.runs import CheckpointError, DiskError, LockError, RunError, replace_file

from ..tasks import Task
from .build import build_model, build_task, load_run
from .config import FOUR, Config, EvaluationOptions, OptionError, check, make_config, planned
from .evaluate import accuracy, check_splits, evaluate

log = logging.getLogger("biohama.experiments")


@dataclass
class Continual:
    """out: folder. tasks: in the order of learning. models: names or {"name": ..., options}. seeds.

    variants: take parts out of every BioHama, too. split: what is measured. options: of every stage, nested, see
    ``make_config``.
    """

    out: str
    tasks: list[Any] = field(default_factory=lambda: list(FOUR))
    models: list[Any] = field(default_factory=lambda: ["biohama_tiny", "lstm", "transformer_rope"])
    variants: bool = True
    seeds: list[int] = field(default_factory=lambda: [0])
    split: str = "id"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tasks", "models", "seeds"):
            check(
                name, getattr(self, name), lambda x: isinstance(x, list) and len(x) > 0, "a list like [a,b], not empty"
            )
        check("variants", self.variants, lambda x: type(x) is bool, "true or false")
        for name in ("task", "model", "seed", "init", "out"):
            if name in self.options:
                raise OptionError(f"{name} cannot be given to every stage: the stages differ in it")

    def config(self, task: Any, model: Any, seed: int, **more: Any) -> Config:
        """The run of one stage. Raises: OptionError."""
        return make_config({**self.options, "task": task, "model": model, "seed": seed, **more})

    def built(self) -> dict[str, Task]:
        """The tasks by name, in order. Raises: OptionError if they share no vocabulary or one lacks the split."""
        found = {}
        for name in self.tasks:
            config = self.config(name, self.models[0], 0)
            task = build_task(config.task)
            check_splits(task, EvaluationOptions(splits=[self.split]))
            found[name if isinstance(name, str) else task.name] = task
        if len({task.vocab_size for task in found.values()}) > 1:
            raise OptionError(f"tasks must share one vocab_size, got {[(n, t.vocab_size) for n, t in found.items()]}")
        if len(found) < len(self.tasks):
            raise OptionError(f"tasks must be different, got {self.tasks}")
        return found


def variants(model: Any, more: bool) -> dict[str, Any]:
    """Name -> options: the model itself and, if a BioHama, what it is without Hebbian memory or sparse router."""
    options = asdict(make_config({"model": model}).model)
    found = {options["name"]: options}
    if more and "modules" in options:
        kept = [name for name in options["modules"] if name != "hebb"]
        found[f"{options['name']} without hebb"] = {**options, "modules": kept}
        found[f"{options['name']} dense router"] = {**options, "threshold": 0.0}
    return found


def stages(plan: Continual, name: str, model: Any, seed: int, tasks: Mapping[str, Task]) -> list[list[float]]:
    """Accuracy [stage][task]: learns one task after another. Raises: as ``train_one``."""
    from .train import train_one

    before, matrix = None, []
    for number, task in enumerate(tasks, 1):
        out = Path(plan.out) / f"{name.replace(' ', '-')}-s{seed}" / f"{number}-{task.replace(':', '.')}"
        config = plan.config(plan.tasks[number - 1], model, seed, init=before, out=str(out))
        config.evaluation.splits = [plan.split]
        train_one(config, resume=True)
        matrix.append(_measured(out, config, tasks))
        log.info("%s, seed %d, after %s: %s", name, seed, task, " ".join(f"{value:.3f}" for value in matrix[-1]))
        before = str(out)
    return matrix


def _measured(out: Path, config: Config, tasks: Mapping[str, Task]) -> list[float]:
    """Seq-Acc of a stage's model on every task; measured once and kept in OUT/continual.json of the stage."""
    file, asked = out / "continual.json", asdict(config.evaluation)
    if file.exists() and (known := json.loads(file.read_text()))["evaluation"] == asked:
        return [known["accuracy"][task] for task in tasks]
    _, _, model = load_run(out)
    reached = {}
    for name, task in tasks.items():
        figures: Any = evaluate(model, task, config.evaluation)  # type: ignore[arg-type]
        reached[name] = accuracy(figures[config.evaluation.splits[0]])  # type: ignore[index]
    replace_file(file, json.dumps({"evaluation": asked, "accuracy": reached}, indent=1))
    return list(reached.values())


def forgetting(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over all tasks but the last of: best accuracy before the last stage - accuracy after it, 0 for one task.

    Source: Chaudhry et al. 2018, "Riemannian walk for incremental learning", equation 3.
    """
    a = np.asarray(matrix)
    return float((a[:-1, :-1].max(0) - a[-1, :-1]).mean()) if len(a) > 1 else 0.0


def run(plan: Continual) -> dict[str, Any]:
    """All variants and seeds. Returns: what OUT/continual.json holds. Raises: as ``train_one``."""
    tasks = plan.built()
    names = list(tasks)
    models = {name: options for model in plan.models for name, options in variants(model, plan.variants).items()}
    for options in models.values():
        build_model(plan.config(plan.tasks[0], options, 0).model, next(iter(tasks.values())).vocab_size)
    found: dict[str, Any] = {"tasks": names, "split": plan.split, "seeds": plan.seeds, "variants": {}}
    for name, options in models.items():
        each = [stages(plan, name, options, seed, tasks) for seed in plan.seeds]
        found["variants"][name] = {
            "accuracy": each,
            "final": [float(np.mean(matrix[-1])) for matrix in each],
            "forgetting": [forgetting(matrix) for matrix in each],
        }
    out = Path(plan.out)
    replace_file(out / "continual.json", json.dumps(found, indent=1))
    replace_file(out / "continual.md", markdown(found))
    from .plot import matrices, write

    means = {name: np.mean(variant["accuracy"], axis=0) for name, variant in found["variants"].items()}
    write(matrices(means, names, plan.split), out / "continual")
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The accuracies at the end and the forgetting, as Markdown."""
    tasks = found["tasks"]
    lines = [
        "# Tasks learnt one after another",
        "",
        f"Order: {', '.join(tasks)}. Seq-Acc on {found['split']}, medians over seeds {found['seeds']}; right "
        "after a task was learnt, then after the last one. Forgetting: mean loss since the best earlier stage.",
        "",
        f"| model | {' | '.join(tasks)} | mean at the end | forgetting |",
        "|" + "---|" * (len(tasks) + 3),
    ]
    for name, variant in found["variants"].items():
        each = np.asarray(variant["accuracy"])
        cells = [f"{np.median(each[:, i, i]):.3f}, {np.median(each[:, -1, i]):.3f}" for i in range(len(tasks))]
        cells += [f"{median(variant['final']):.3f}", f"{median(variant['forgetting']):.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![accuracy after each stage](continual.png)", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns: the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run(planned(Continual, sys.argv[1:] if argv is None else argv))
    except (ValueError, TypeError, ImportError, LockError) as error:
        return _fail(error, 2)
    except (RunError, CheckpointError, DiskError) as error:
        return _fail(error, 1)
    return 0


def _fail(error: Exception, code: int) -> int:
    print(f"biohama.experiments.continual: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
