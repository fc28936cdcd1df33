"""How good a model is on every split of a task. Of a finished run: ``python -m biohama.experiments.evaluate RUN``."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sprout.runs import CheckpointError, RunError, replace_file

from ..generation import StreamModel, evaluating, free_run, teacher_forced
from ..metrics import perplexity_meter, seq_right
from ..tasks import PAD, Batch, Task
from .build import continued, load_run
from .config import EvaluationOptions, OptionError, nested

log = logging.getLogger("biohama.experiments")


def split_generator(seed: int, split: str) -> torch.Generator:
    """A generator of its own for each split: what is drawn for one does not depend on the others."""
    digest = hashlib.sha256(f"{seed} {split}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def evaluate(
    model: StreamModel, task: Task, options: EvaluationOptions, stopped: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """split -> figures, of sequences that depend on options.seed and the task alone; None if stopped() became true.

    Figures: sequences; seq_acc, in free running (null without one), of free_running_sequences; seq_acc_teacher_forced,
    token_acc (teacher-forced) and perplexity; by_length, [scored positions, sequences, right ones] in free running
    (teacher-forced without one).
    Raises: OptionError for a split that the task does not have.
    """
    figures: dict[str, Any] = {}
    for split in check_splits(task, options):
        batch = Batch(*task.sample(split, options.sequences, split_generator(options.seed, split)))
        found = _measure(model, batch, options, stopped)
        if found is None:
            return None
        figures[split] = found
    return figures


def check_splits(task: Task, options: EvaluationOptions) -> Sequence[str]:
    """The splits to measure. Raises: OptionError for one that the task does not have."""
    splits = task.splits if options.splits is None else options.splits
    for split in splits:
        if split not in task.splits:
            raise OptionError(f"evaluation.splits must be out of {', '.join(task.splits)}, got {split!r}")
    return splits


def _measure(
    model: StreamModel, batch: Batch, options: EvaluationOptions, stopped: Callable[[], bool]
) -> dict[str, Any] | None:
    n = len(batch.tokens)
    free = n if options.free_running is None else min(n, options.free_running)
    told, alone = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    right, meter = torch.zeros(2, dtype=torch.int64), perplexity_meter().to(_device(model))
    for rows, part in slices(batch, options.batch_size):
        if stopped():
            return None
        part = part.to(_device(model))
        with evaluating(model):
            logits = model(part.tokens)
        meter.update(logits, part.targets)
        pred, scored = logits.argmax(-1), part.scored()
        told[rows] = seq_right(pred, part).cpu()
        right += torch.stack([(pred == part.targets)[scored].sum(), scored.sum()]).cpu()
        use = rows < free
        if use.any():
            part = trimmed(Batch(*(tensor[use.to(tensor.device)] for tensor in part)))
            alone[rows[use]] = seq_right(free_run(model, part), part).cpu()
    lengths = batch.scored().sum(1)
    measured = alone if free else told
    return {
        "sequences": n,
        "free_running_sequences": free,
        "seq_acc": alone[:free].double().mean().item() if free else None,
        "seq_acc_teacher_forced": told.double().mean().item(),
        "token_acc": (right[0] / right[1]).item(),
        "perplexity": meter.compute().item(),
        "by_length": by_length(lengths[: free or n], measured[: free or n]),
    }


def accuracy(figures: Mapping[str, Any]) -> float:
    """Seq-Acc of a split, teacher-forced where none was measured in free running."""
    free = figures["seq_acc"]
    return figures["seq_acc_teacher_forced"] if free is None else free


def headline(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """Seq-Acc of all splits in a line."""
    return "  ".join(f"{name} {accuracy(figures):.3f}" for name, figures in splits.items())


def by_length(lengths: Tensor, right: Tensor) -> list[list[int]]:
    """[[length, sequences, right ones], ...], ascending. Args: lengths (B,) int64, right (B,) bool."""
    rows = []
    for length in lengths.unique().tolist():
        here = lengths == length
        rows.append([length, int(here.sum()), int(right[here].sum())])
    return rows


def exact(model: StreamModel, batch: Batch, batch_size: int) -> Tensor:
    """(B,) bool: which sequences are right throughout, teacher-forced."""
    right = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for rows, part in slices(batch, batch_size):
        part = part.to(_device(model))
        right[rows] = seq_right(teacher_forced(model, part), part).cpu()
    return right


def slices(batch: Batch, size: int) -> Iterator[tuple[Tensor, Batch]]:
    """(rows, those sequences without common padding) of all the batch, like lengths together."""
    for rows in _lengths(batch).argsort(stable=True).split(size):
        yield rows, trimmed(Batch(*(tensor[rows] for tensor in batch)))


def trimmed(batch: Batch) -> Batch:
    """The batch as long as its longest sequence."""
    return Batch(*(tensor[:, : int(_lengths(batch).max())] for tensor in batch))


def _lengths(batch: Batch) -> Tensor:
    used = (batch.tokens != PAD) | batch.scored()
    return (used * torch.arange(1, used.shape[1] + 1, device=used.device)).amax(1)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def evaluate_run(path: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """Measures a finished run again with other options, {"evaluation": {...}}, and replaces its results.

    Raises: OptionError, RunError, CheckpointError, DiskError.
    """
    file = Path(path) / "results.json"
    if not file.exists():
        raise RunError(f"{file} is missing: the run is not finished; continue it with resume={path}")
    options = continued(path, given, ("evaluation",)).evaluation
    _, task, model = load_run(path)
    started = time.perf_counter()
    splits = evaluate(model, task, options)  # type: ignore[arg-type]
    results = json.loads(file.read_text()) | {"splits": splits, "evaluation_seed": options.seed}
    results["evaluation_seconds"] = time.perf_counter() - started
    replace_file(file, json.dumps(results, indent=1))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """``RUN [evaluation.KEY=VALUE ...]``. Returns: the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or "=" in arguments[0]:
            raise OptionError("the first argument must be a run's folder: RUN [evaluation.KEY=VALUE ...]")
        results = evaluate_run(arguments[0], nested(arguments[1:]))
    except (ValueError, RunError, CheckpointError, OSError) as error:
        print(f"biohama.experiments.evaluate: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({name: split["seq_acc"] for name, split in results["splits"].items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
