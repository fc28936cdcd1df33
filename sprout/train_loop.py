"""A training run from its folder to its summary: progress, metrics, checkpoints, signals, the end."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import ExitStack
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from tqdm.contrib.logging import logging_redirect_tqdm

from . import hub
from .disk import replace_file
from .pretrained import TOKENIZER
from .runs import Interrupt, Reporter, RunError, RunFolder, environment
from .sampling import generate
from .sharded_pool import sharded_tables
from .sharded_state import gathered, use_reference_
from .train_metrics import pattern_figures
from .trainer import Plan, Trainer

log = logging.getLogger("sprout.train")
SAMPLE_PROMPT, SAMPLE_TOKENS = 32, 256
ANALYSED = 20_000  # characters of the validation text that the report is made from
SHOWN = {
    "train": ("loss", "lr", "grad_norm", "tokens_per_second", "active_mean", "jaccard", "gate_change"),
    "val": ("loss", "bits_per_character", "active_mean", "jaccard", "gate_change", "used_share", "seconds"),
}


def make_accelerator(plan: Plan) -> Accelerator:
    """Device, precision, accumulation and processes as the options and the launcher say.

    Raises: RunError if another run of this process used another device or precision, which accelerate cannot change.
    """
    # Without interaction its parameters have no gradient; our buffers are the layout of connections and never change.
    unused = plan.config.model == "sprout" and plan.sizes.n_interaction_steps == 0
    ddp = DistributedDataParallelKwargs(find_unused_parameters=unused, broadcast_buffers=False)
    try:
        return Accelerator(
            cpu=plan.config.device == "cpu",
            mixed_precision=plan.config.mixed_precision,
            gradient_accumulation_steps=plan.config.grad_accumulation,
            kwargs_handlers=[ddp],
        )
    except ValueError as error:
        raise RunError(f"an earlier run of this process had another device or precision; start anew: {error}") from None


def fit(plan: Plan, request: dict[str, Any], out: Path, *, resume: bool, force: bool) -> int:
    """Runs a plan in the folder out. Returns: 0, or 130 / 143 after SIGINT / SIGTERM with a checkpoint of that step.

    Args: request, what config.json keeps; resume, continue the run in out; force, see ``disk.Lock``.
    Raises: RunError, LockError, CheckpointError, DiskError.
    """
    accelerator = make_accelerator(plan)
    with Interrupt() as stop, ExitStack() as stack:
        stack.callback(accelerator.end_training)  # ends the group of processes, where there is one
        folder = None
        if accelerator.is_main_process:
            folder = stack.enter_context(open_folder(plan, request, out, resume=resume, force=force))
            stack.enter_context(logging_redirect_tqdm())
        accelerator.wait_for_everyone()
        return Loop(plan, accelerator, folder, stop).run(resume)


def open_folder(plan: Plan, request: dict[str, Any], out: Path, *, resume: bool, force: bool) -> RunFolder:
    """The run's folder, new or as it was left; arguments and errors as in ``fit``."""
    if not resume:
        return RunFolder.create(out, request, texts={TOKENIZER: plan.tokenizer.to_json()}, force=force)
    folder = RunFolder.resume(out, force=force)
    folder.configure(request)  # with the options that changed
    return folder


class Loop:
    """The steps of a run and what is due between them. folder is None on all but the main process."""

    def __init__(self, plan: Plan, accelerator: Accelerator, folder: RunFolder | None, stop: Interrupt) -> None:
        self.plan, self.config, self.accelerator, self.stop = plan, plan.config, accelerator, stop
        self.folder, self.reporter = folder, None
        self.trainer = Trainer(plan, accelerator)
        self.score: float | None = None  # validation loss of this very step, if there was an evaluation
        self.saved = -1
        self.since_log, self.train_seconds = 0, 0.0
        self.clock = time.perf_counter()

    def run(self, resume: bool) -> int:
        """All steps, then the end; see ``fit``."""
        trainer = self.trainer
        if resume:
            self._restore()
        if self.folder is not None:
            self.folder.record_start(trainer.step, environment(self.config.seed, device_name(self.accelerator.device)))
            self.reporter = Reporter(
                self.folder, trainer.step, trainer.total, shown=SHOWN, log=log, tensorboard=self.config.tensorboard
            )
        self._log_start()
        try:
            self._steps()
            figures = None if self._stopped() else self._evaluate(None)
            if self.saved != trainer.step:
                self._save()
            if figures is None:
                return self.stop.exit_code
            self._finish(figures)
            return 0
        finally:
            if self.reporter is not None:
                self.reporter.close()

    def _restore(self) -> None:
        found = None
        if self.folder is not None:
            found = self.folder.rewind()
            (self.folder.path / "final.json").unlink(missing_ok=True)
        if self.accelerator.num_processes > 1:
            told: list[Any] = [found and self.trainer.outline(found)]
            broadcast_object_list(told)
            found = found or told[0]
        if found is None:
            log.warning("no checkpoint yet: starting from step 0")
        else:
            self.trainer.restore(found)
            log.info("resumed at step %d", found.step)

    def _log_start(self) -> None:
        if self.folder is not None:
            n, free = parameters(self.trainer.model)
            log.info("%s: %d parameters, %d of them outside the embeddings", self.config.model, n, free)
            held_out = len(self.plan.validation)
            log.info("text: %d tokens to learn from, %d held out", len(self.plan.train), held_out)
            log.info(
                "%d steps of %d tokens, from step %d", self.trainer.total, self._tokens_per_step(), self.trainer.step
            )

    def _tokens_per_step(self) -> int:
        c = self.config
        return c.batch_size * c.window * c.grad_accumulation * self.accelerator.num_processes

    def _tick(self) -> float:
        """Seconds since the last tick, which are added to the run's."""
        now = time.perf_counter()
        passed, self.clock = now - self.clock, now
        self.trainer.seconds += passed
        return passed

    def _stopped(self) -> bool:
        signal = self.stop.signal or 0
        if self.accelerator.num_processes > 1:  # all stop at the same step
            number = torch.tensor(signal, device=self.accelerator.device)
            signal = int(torch.as_tensor(self.accelerator.gather(number.unsqueeze(0))).max())
            self.stop.signal = signal or None
        return signal != 0

    def _due(self, every: int) -> bool:
        return self.trainer.step > 0 and self.trainer.step % every == 0

    def _steps(self) -> None:
        trainer, c = self.trainer, self.config
        save_every = c.save_every or c.eval_every
        if self._due(c.eval_every) and trainer.step < trainer.total and not self._recorded():
            self._evaluate(c.eval_batches)  # a signal had come between this step and its evaluation
            if self._due(save_every):
                self._save()
        self._tick()
        while trainer.step < trainer.total and not self._stopped():
            facts = trainer.train_step()
            self.score = None
            self.since_log += 1
            self.train_seconds += self._tick()
            if self.reporter is not None:
                self.reporter.bar.update()
            if self._due(c.log_every) or trainer.step == trainer.total:
                self._log_train(facts)
            if trainer.step < trainer.total:
                if self._due(c.eval_every):
                    self._evaluate(c.eval_batches)
                if self._due(save_every):
                    self._save()

    def _log_train(self, facts: dict[str, Any]) -> None:
        loss, result = self.trainer.mean_loss(), facts["result"]
        if self.reporter is not None:
            speed = self.since_log * self._tokens_per_step() / max(self.train_seconds, 1e-9)
            figures = {"loss": loss, "lr": facts["lr"], "grad_norm": float(facts["grad_norm"])}
            if result.history:
                figures |= {"balance": result.balance.item(), "settling": result.settling.item()}
            figures |= {**pattern_figures(result.history), "tokens_per_second": speed, "seconds": self.trainer.seconds}
            self.reporter.record(self.trainer.step, "train", figures)
        self.since_log, self.train_seconds = 0, 0.0

    def _recorded(self) -> bool:
        """Whether metrics.jsonl has an evaluation of this step; on every process the main one's answer."""
        answer: list[Any] = [False]
        if self.folder is not None:
            answer = [any(r["step"] == self.trainer.step and r["kind"] == "val" for r in self.folder.metrics())]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(answer)
        return answer[0]

    def _evaluate(self, limit: int | None) -> dict[str, Any] | None:
        """Measures and records; None if a signal came meanwhile (a single process then leaves the rest out)."""
        batches = self.trainer.validation_batches()
        batches = batches if limit is None else islice(batches, limit)
        if self.accelerator.num_processes == 1:
            batches = takewhile(lambda _: self.stop.signal is None, batches)
        recorded = self._recorded()
        figures = self.trainer.evaluate(batches, self.config.eval_batches)
        self._tick()
        if self._stopped():
            return None
        self.score = figures.pop("score")
        self.trainer.best = min(self.trainer.best, self.score)
        figures |= {"whole": limit is None, "seconds": self.trainer.seconds}
        if self.reporter is not None and not recorded:
            self.reporter.record(self.trainer.step, "val", figures)
        return figures

    def _save(self) -> None:
        checkpoint = self.trainer.checkpoint(self.score)
        if self.folder is not None:
            self.folder.save(checkpoint)
        self.saved = self.trainer.step
        self._tick()

    def _finish(self, figures: dict[str, Any]) -> None:
        trainer = self.trainer
        model = gathered(trainer.model.eval())
        if self.folder is None:
            return
        path = self.folder.path
        hub.save(model, path / "model", self.plan.tokenizer)
        n, free = parameters(model)
        summary = {
            "model": self.config.model,
            "steps": trainer.step,
            "tokens": trainer.step * self._tokens_per_step(),
            "parameters": n,
            "parameters_without_embeddings": free,
            "seconds": trainer.seconds,
            "best_val_loss": trainer.best,
            "val": figures,
        }
        if model is not trainer.model:  # on the CPU
            use_reference_(model)
        replace_file(path / "samples.txt", self._sample(model))
        replace_file(path / "final.json", json.dumps(summary, indent=1))
        log.info("%s: loss %.4f nats, %.4f bits per character", path, figures["loss"], figures["bits_per_character"])
        if self.config.analyze_activation:
            self._analyze(model, path)

    def _sample(self, model: Any) -> str:
        tokenizer, prompt = self.plan.tokenizer, self.plan.validation_text[:SAMPLE_PROMPT]
        tokens = tokenizer.encode(prompt).unsqueeze(0).to(next(model.parameters()).device)
        drawn = generate(model, tokens, SAMPLE_TOKENS, temperature=0.8, seed=self.config.seed)
        return f"# prompt\n{prompt}\n# prompt and what follows (temperature 0.8)\n{tokenizer.decode(drawn[0].cpu())}\n"

    def _analyze(self, model: Any, path: Path) -> None:
        if self.config.model != "sprout":
            log.warning("--analyze_activation looks at a pool, and --model %s has none", self.config.model)
            return
        from .analysis.report import write_report

        text = self.plan.validation_text[:ANALYSED]
        page = write_report(model, self.plan.tokenizer, text, path / "analysis")
        log.info("analysis: %s", page)


def parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(all, those outside the token and position embeddings), of a pool that is spread over processes on all."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    sizes |= {
        f"{name}.local": table.n_rows * math.prod(table.local.shape[1:])
        for name, table in sharded_tables(model).items()
    }
    embeddings = sum(n for name, n in sizes.items() if {"embedding", "position"} & set(name.split(".")))
    return sum(sizes.values()), sum(sizes.values()) - embeddings


def device_name(device: torch.device) -> str:
    """What kind of device it is: "cpu", or a GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
