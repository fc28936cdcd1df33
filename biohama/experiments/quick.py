"""Every part of BioHama and its experiments in under a minute on one core: ``python -m biohama.experiments.quick``.

Shapes of each module, a short training on copy, a run that is cut and goes on, generation, results, a report. Without
--out all of it happens in a temporary folder.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..generation import free_run, teacher_forced
from ..tasks import Batch
from .build import build_model, build_task, load_run
from .config import make_config
from .evaluate import headline, split_generator, trimmed
from .report import write_report

STEPS = 150
OPTIONS = {
    "task": "copy",
    "model": "biohama_tiny",
    "device": "cpu",
    "threads": 1,
    "train": {"steps": STEPS, "warmup_steps": 20, "lr": 3e-3, "log_every": 10, "save_every": 50},
    "evaluation": {"sequences": 40, "splits": ["train", "id", "ood"]},
}


@contextmanager
def part(name: str) -> Iterator[None]:
    """Says what comes, and how long it took."""
    print(f"== {name}", flush=True)
    started = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - started:.1f} s", flush=True)


def shapes() -> None:
    """Prints what every module of a BioHama makes of one batch."""
    config = make_config(OPTIONS)
    task = build_task(config.task)
    model = build_model(config.model, task.vocab_size)
    batch = Batch(*task.sample("train", 2, torch.Generator().manual_seed(0)))
    lines: list[str] = [f"{'tokens':<28}{tuple(batch.tokens.shape)}"]
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: lines.append(f"{name:<28}{_shape(out)}"))
        for name, module in model.named_modules()
        if name
    ]
    with torch.no_grad():
        trace: Any = model.trace(batch.tokens)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    lines += [f"trace.{name:<22}{_shape(value)}" for name, value in zip(trace._fields, trace, strict=True)]
    print("\n".join(f"   {line}" for line in lines))
    print(f"   {sum(p.numel() for p in model.parameters())} parameters; modules: {', '.join(trace.names)}")


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, tuple) and all(isinstance(v, (Tensor, tuple)) for v in value):
        return ", ".join(map(_shape, value))
    return str(value)


class Cut(Exception):
    """What the run that is cut dies of."""


def train(out: Path) -> dict[str, Any]:
    """A run, and the same one cut in the middle and resumed. Raises: RuntimeError unless they end bitwise alike."""
    from .train import train_one
    from .trainer import Trainer

    whole = train_one({**OPTIONS, "out": str(out / "whole")})
    step = Trainer.train_step

    def cut(self: Trainer) -> dict[str, Any]:
        if self.step == STEPS - 10:
            raise Cut
        return step(self)

    Trainer.train_step = cut  # type: ignore[method-assign]
    try:
        train_one({**OPTIONS, "out": str(out / "parts")})
    except Cut:
        print("   cut off; going on from its last checkpoint")
    finally:
        Trainer.train_step = step  # type: ignore[method-assign]
    train_one({**OPTIONS, "out": str(out / "parts")}, resume=True)
    weights = [load_run(out / name)[2].state_dict() for name in ("whole", "parts")]
    if not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]):
        raise RuntimeError("the resumed run ended with other weights than the whole one")
    print("   the resumed run ended with the same bits")
    return whole


def generate(run: Path) -> None:
    """Prints what the trained model answers, in free running and with the right answers put in."""
    _, task, model = load_run(run)
    batch = trimmed(Batch(*task.sample("id", 1, split_generator(0, "quick"))))
    scored = batch.scored()[0]
    for name, tokens in (
        ("input", batch.tokens[0][batch.given[0]]),
        ("right answer", batch.targets[0][scored]),
        ("free running", free_run(model, batch)[0][scored]),  # type: ignore[arg-type]
        ("teacher forcing", teacher_forced(model, batch)[0][scored]),  # type: ignore[arg-type]
    ):
        print(f"   {name:<17}{' '.join(task.describe(tokens))}")


def run(out: Path) -> None:
    """All parts, in the folder out. Raises: RuntimeError if one does not do what it should."""
    with part("shapes"):
        shapes()
    with part(f"training on copy, {STEPS} steps, twice: whole, and cut and resumed"):
        results = train(out)
        print(f"   Seq-Acc  {headline(results['splits'])}")
    with part("generation"):
        generate(out / "whole")
    with part("a baseline and the report"):
        from .train import train_one

        train_one({**OPTIONS, "model": "gru", "out": str(out / "gru")})
        print(f"   {write_report([out / 'whole', out / 'gru'], out / 'report')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns: the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(prog="python -m biohama.experiments.quick", description="Every part in a minute.")
    parser.add_argument("--out", help="new folder to keep runs and report in (default: a temporary one)")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        if arguments.out is None:
            with tempfile.TemporaryDirectory() as folder:
                run(Path(folder))
        else:
            run(Path(arguments.out))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(f"every part works, {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
