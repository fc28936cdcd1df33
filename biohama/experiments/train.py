"""One run from its options to its results: the loop and what is due in it, signals, the end."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from sprout.runs import (
    Interrupt,
    Reporter,
    RunError,
    RunFolder,
    check_new,
    environment,
    replace_file,
    seed_everything,
)

from .build import build_task, refuse_changes, run_config
from .config import Config, OptionError, changes, make_config, of_a_run, run_name, task_label
from .evaluate import check_splits, evaluate, headline
from .trainer import Trainer

log = logging.getLogger("biohama.experiments")
SHOWN = {"train": ("loss", "steps_per_second"), "check": ("seq_acc",)}
LINE_EVERY = 10  # records of training for one line of log


def train_one(options: Config | Mapping[str, Any], *, resume: bool = False) -> dict[str, Any]:
    """Trains and evaluates one model; without Hydra, for scripts.

    Args: options, a Config or what ``make_config`` takes; resume, continue the run in options.out (which may hold none
        yet), a finished one is only read.
    Returns: what RUN/results.json holds. Side effects: the run's folder; torch's number of threads, if it is an option.
    Raises: OptionError, RunError, LockError, CheckpointError, DiskError; SystemExit(130 or 143) after SIGINT or
        SIGTERM, with a checkpoint of that step.
    """
    config = options if isinstance(options, Config) else make_config(options)
    path = Path(config.out or f"runs/{run_name(config)}")
    old = resume and (path / "config.json").exists()
    if old:
        stored = run_config(path)
        refuse_changes(config, stored)
        if (path / "results.json").exists() and of_a_run(config) == of_a_run(stored):
            return json.loads((path / "results.json").read_text())
    accelerator = make_accelerator(config)
    task = build_task(config.task)
    check_splits(task, config.evaluation)
    if not old:
        refuse_used(path)
    seed_everything(config.seed)
    trainer = Trainer(config, task, accelerator)
    with Interrupt() as stop, open_folder(config, path, old) as folder, logging_redirect_tqdm():
        return Loop(trainer, folder, stop).run(old)


def refuse_used(path: Path) -> None:
    """Raises OptionError unless path is a folder that a new run can take."""
    try:
        check_new(path)
    except RunError as error:
        raise OptionError(str(error).replace("--resume ", "resume=").replace("--out", "out=")) from None


def make_accelerator(config: Config) -> Accelerator:
    """The device that the options name. Raises: OptionError if it is not there; RunError, see below."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device=cuda: torch finds no CUDA device; use device=cpu")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        # whatever accelerate's own configuration says: BioHama does not run under autocast
        accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision="no")
    except ValueError as error:  # accelerate keeps the first one for the life of a process
        raise RunError(f"an earlier run of this process had another device; start anew: {error}") from None
    if accelerator.num_processes > 1:
        raise RunError("an experiment is one process; for many runs at once use biohama.experiments.suite with jobs=N")
    return accelerator


def open_folder(config: Config, path: Path, old: bool) -> RunFolder:
    """The run's folder, new or as it was left. Raises: RunError, LockError, DiskError."""
    request = {"experiment": of_a_run(config)}
    if not old:
        return RunFolder.create(path, request, keep=1, force=config.force)
    folder = RunFolder.resume(path, keep=1, force=config.force)
    folder.configure(request)
    return folder


class Loop:
    """The steps of a run and what is due between them."""

    reporter: Reporter

    def __init__(self, trainer: Trainer, folder: RunFolder, stop: Interrupt) -> None:
        self.trainer, self.folder, self.stop, self.options = trainer, folder, stop, trainer.options
        self.clock, self.saved = time.perf_counter(), -1

    def run(self, resume: bool) -> dict[str, Any]:
        """Returns: the results. Raises: SystemExit after a signal, see ``train_one``."""
        trainer, config = self.trainer, self.trainer.config
        found = self.folder.rewind() if resume else None
        if found is not None:
            trainer.restore(found)
            self.saved = found.step
        (self.folder.path / "results.json").unlink(missing_ok=True)
        device = str(trainer.accelerator.device)
        self.folder.record_start(trainer.step, environment(config.seed, device))
        log.info("%s: from step %d to %d", self.folder.path, trainer.step, self.options.steps)
        self.reporter = Reporter(
            self.folder, trainer.step, self.options.steps, shown=SHOWN, log=log, tensorboard=self.options.tensorboard
        )
        try:
            self._steps()
        finally:
            self.reporter.close()
        if self.saved != trainer.step:
            self._save()
        started = time.perf_counter()
        splits = None if self.stop.signal else evaluate(trainer.model, trainer.task, config.evaluation, self._stopped)
        if splits is None:
            raise SystemExit(self.stop.exit_code)
        results = self._results(splits, time.perf_counter() - started)
        replace_file(self.folder.path / "results.json", json.dumps(results, indent=1))
        log.info("%s: %.0f s, Seq-Acc  %s", self.folder.path, trainer.seconds, headline(splits))
        return results

    def _stopped(self) -> bool:
        return self.stop.signal is not None

    def _tick(self) -> None:
        now = time.perf_counter()
        self.trainer.seconds += now - self.clock
        self.clock = now

    def _steps(self) -> None:
        trainer, o = self.trainer, self.options
        self.clock, begun = time.perf_counter(), (trainer.seconds, trainer.step)
        if trainer.step and self._due(o.check_every) and not self._checked():
            self._check()  # a signal came between this step and its measurement
        while not trainer.finished and not self._stopped():
            facts = trainer.train_step()
            self._tick()
            self.reporter.bar.update()
            if self._due(o.log_every) or trainer.finished:
                self._log(facts, begun)
                begun = (trainer.seconds, trainer.step)
            if self._due(o.check_every) and not self._stopped():
                self._check()
            if self._due(o.save_every) and not trainer.finished:
                self._save()

    def _due(self, every: int) -> bool:
        return every > 0 and self.trainer.step % every == 0

    def _log(self, facts: dict[str, Any], begun: tuple[float, int]) -> None:
        trainer = self.trainer
        speed = (trainer.step - begun[1]) / max(1e-9, trainer.seconds - begun[0])
        figures = {"loss": trainer.mean_loss(), **{name: plain(value) for name, value in facts.items()}}
        figures |= {"steps_per_second": speed, "seconds": trainer.seconds}
        quiet = trainer.step % (LINE_EVERY * self.options.log_every) > 0 and not trainer.finished
        self.reporter.record(trainer.step, "train", figures, quiet=quiet)

    def _checked(self) -> bool:
        return any(r["step"] == self.trainer.step and r["kind"] == "check" for r in self.folder.metrics())

    def _check(self) -> None:
        reached = self.trainer.check()
        if self.options.stop_at is not None and reached >= self.options.stop_at:
            self.trainer.done, self.saved = True, -1  # a checkpoint of this step, if there is one, does not know yet
        self.reporter.record(self.trainer.step, "check", {"seq_acc": reached})
        self.clock = time.perf_counter()  # measuring is not training

    def _save(self) -> None:
        self.folder.save(self.trainer.checkpoint())
        self.saved = self.trainer.step
        self.clock = time.perf_counter()

    def _results(self, splits: dict[str, Any], seconds: float) -> dict[str, Any]:
        trainer, config = self.trainer, self.trainer.config
        return {
            "task": task_label(config.task),
            "model": config.model.name,
            "changes": changes(config),
            "seed": config.seed,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "steps": trainer.step,
            "train_seconds": trainer.seconds,
            "evaluation_seconds": seconds,
            "evaluation_seed": config.evaluation.seed,
            "splits": splits,
        }


def plain(value: Any) -> Any:
    """A tensor as a number or list of numbers; anything else as it is."""
    return value.tolist() if isinstance(value, Tensor) else value
