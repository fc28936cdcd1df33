"""One training step, its evaluation and its state: optimizers, learning rate, sampling, checkpoints' content."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from . import hub
from .config import SproutConfig
from .pretrained import CONFIG, TOKENIZER, config_text
from .runs import Checkpoint, RunError, random_state, seed_everything, set_random_state
from .sharded_pool import shard_, sharded_tables
from .sharded_state import (
    load_weights,
    optimizer_outline,
    outline,
    own_optimizer_state,
    whole_optimizer_state,
    whole_weights,
)
from .sparse_gradients import clip_grad_norm_, sparse_tables
from .text import Tokenizer
from .train_config import TrainConfig, check_scaled, check_sharded
from .train_metrics import Learner, all_windows, evaluate, per_text, random_windows

log = logging.getLogger("sprout.train")


@dataclass(frozen=True)
class Plan:
    """A run that has been checked and can start; train and validation are tokens, (L,) int64."""

    config: TrainConfig
    sizes: SproutConfig
    tokenizer: Tokenizer
    train: Tensor
    validation: Tensor
    validation_text: str


def schedule(step: int, total: int, warmup_steps: int) -> float:
    """Share of the highest learning rate in step 0..total-1: linear warm-up to 1, then a cosine to 0.1."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total - warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(share, 1.0)))


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest. Vectors and tables are not decayed.

    A hidden matrix maps states to states: no embedding, readout or head, none with a row for each neuron or one row.
    Of a pool in groups SparseAdam takes the tables of the neurons: it moves only the rows that have a gradient.
    """
    hidden, matrices, vectors, sparse, tables = [], [], [], [], sparse_tables(model)
    rows = {"embedding", "position", "neuron_signatures", "group_signatures", "connection_strength", "readout", "head"}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        table = bool(rows & set(name.split(".")))  # decay would pull down what a batch leaves alone
        wide = parameter.dim() == 2 and min(parameter.shape) > 1
        if name in tables:
            sparse.append(parameter)
        elif config.optimizer == "muon" and wide and not table:
            hidden.append(parameter)
        else:
            (matrices if parameter.dim() >= 2 and not table else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(0.9, config.beta2), fused=True)
    ]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay))
    if sparse:
        optimizers.append(torch.optim.SparseAdam(sparse, lr=config.lr, betas=(0.9, config.beta2)))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["highest_lr"] = group["lr"]
    return optimizers


class Trainer:
    """The model of a run with all that a step needs; on every process the same."""

    def __init__(self, plan: Plan, accelerator: Accelerator) -> None:
        self.plan, self.config, self.accelerator = plan, plan.config, accelerator
        seed_everything(plan.config.seed)
        model: Any = hub.make_model(plan.config.model, plan.sizes)
        if plan.config.freeze_strength and plan.config.model == "sprout":
            model.pool.connection_strength.requires_grad_(False)
        check_scaled(plan.config, bool(sparse_tables(model)))
        if sparse_tables(model) and accelerator.num_processes > 1:
            check_sharded(plan.config)
            shard_(model)
        self.model = model
        learner = Learner(model, plan.config.balance, plan.config.settling)
        prepared = accelerator.prepare(learner, *make_optimizers(model, plan.config))
        self.learner, self.optimizers = prepared[0], list(prepared[1:])
        self.sampler = torch.Generator().manual_seed(plan.config.seed)
        self.total = plan.config.total_steps(len(plan.train), accelerator.num_processes)
        self.step, self.seconds, self.best = 0, 0.0, math.inf
        self.loss_sum, self.loss_steps = torch.zeros((), dtype=torch.float64, device=accelerator.device), 0

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; self.step is the number taken before it."""
        share = schedule(self.step, self.total, self.config.warmup_steps)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["highest_lr"] * share
        result, histories, norm = None, [], 0.0
        for _ in range(self.config.grad_accumulation):
            tokens = self._batch()
            with self.accelerator.accumulate(self.learner):
                result = self.learner(tokens)
                self.accelerator.backward(result.loss)
                if self.accelerator.sync_gradients:
                    limit = self.config.grad_clip or math.inf
                    norm = self._clip_grad_norm(limit)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            self.loss_sum += result.language.detach().double() / self.config.grad_accumulation
            histories.append(result.history)
        if self.config.hebb is not None:
            eta, decay = self.config.hebb
            for history in histories:
                self.model.plasticity(history, eta=eta / len(histories), decay=decay)
        self.loss_steps += 1
        self.step += 1
        if self.config.rewire_every and self.step % self.config.rewire_every == 0:
            self.model.rewire([history[-1] for history in histories], optimizers=self.optimizers)
        return {"result": result, "grad_norm": norm, "lr": share * self.config.lr}

    def _clip_grad_norm(self, limit: float) -> Any:
        if not sparse_tables(self.model):
            return self.accelerator.clip_grad_norm_(self.learner.parameters(), limit)
        self.accelerator.unscale_gradients()
        return clip_grad_norm_(self.learner.parameters(), limit, tables=list(sharded_tables(self.model).values()))

    def _batch(self) -> Tensor:
        """This process's windows; every process draws the same numbers and takes its share."""
        c, n = self.config, self.accelerator.num_processes
        windows = random_windows(self.plan.train, c.batch_size * n, c.window, self.sampler)
        return windows[self.accelerator.process_index :: n].to(self.accelerator.device)

    def validation_batches(self) -> Iterator[Tensor]:
        """The whole validation text, see ``all_windows``."""
        return all_windows(self.plan.validation, self.config.batch_size, self.config.window)

    def evaluate(self, batches: Iterator[Tensor], first: int) -> dict[str, float]:
        """Figures of batches of the validation text, {} if there are none; "score" is the loss of the first ones."""
        figures = evaluate(Learner(self.model), batches, first, self.accelerator)
        if not figures:
            return figures
        return figures | per_text(figures["loss"], len(self.plan.validation), self.plan.validation_text)

    def checkpoint(self, score: float | None) -> Checkpoint:
        """What ``restore`` continues from, with config and tokenizer; call it on every process. Raises: RunError.

        Whole on the main process alone, where the pool is spread over processes.
        """
        self.check_finite()
        texts = {CONFIG: config_text(self.config.model, self.plan.sizes), TOKENIZER: self.plan.tokenizer.to_json()}
        return Checkpoint(self.step, whole_weights(self.model), self.state(), score, texts)

    def mean_loss(self) -> float:
        """Mean training loss in nats per token since the last call, over all processes. Raises: RunError.

        Tables with sparse gradients are not looked at here, which would cost what the pool does; ``checkpoint`` does.
        """
        self.check_finite(but=sparse_tables(self.model))
        mean = self.loss_sum / max(1, self.loss_steps)
        loss = float(self.accelerator.reduce(mean, "mean"))  # type: ignore[arg-type]
        self.loss_sum.zero_()
        self.loss_steps = 0
        return loss

    def check_finite(self, but: Set[str] = frozenset()) -> None:
        """Raises RunError, on all processes, if a loss or a weight, but those of these names, is not a finite number.

        Such a step is not worth saving.
        """
        weights = all(bool(p.isfinite().all()) for name, p in self.model.named_parameters() if name not in but)
        fine = torch.tensor(weights and math.isfinite(float(self.loss_sum)), device=self.accelerator.device)
        if not torch.as_tensor(self.accelerator.gather(fine.unsqueeze(0))).all():
            raise RunError(f"the loss or a weight is not finite at step {self.step}; lower --lr or set --grad_clip")

    def state(self) -> dict[str, Any]:
        """Everything besides the weights that the next step depends on, as a tree; call it on every process."""
        own, several = [random_state()], self.accelerator.num_processes > 1
        loss: Any = self.accelerator.reduce(self.loss_sum, "mean") if several else self.loss_sum
        scaler = self.accelerator.scaler
        return {
            "optimizers": [whole_optimizer_state(optimizer, self.model) for optimizer in self.optimizers],
            "sampler": self.sampler.get_state(),
            "random": gather_object(own) if several else own,
            "scaler": None if scaler is None else scaler.state_dict(),
            "seconds": self.seconds,
            "best": self.best,
            "loss": [float(loss), self.loss_steps],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def outline(self, found: Checkpoint) -> Checkpoint:
        """What the other processes need of the main one's checkpoint for ``restore``: tables without their numbers."""
        states = zip(self.optimizers, found.state["optimizers"], strict=True)
        optimizers = [optimizer_outline(optimizer, self.model, state) for optimizer, state in states]
        weights = outline(self.model, found.weights)
        return replace(found, weights=weights, state={**found.state, "optimizers": optimizers})

    def restore(self, found: Checkpoint) -> None:
        """Continues where a checkpoint was made, bitwise if by as many processes; every process calls it.

        With another number of them each takes the random state of its rank, and one that had none is seeded from seed,
        rank and step. Windows are drawn as before; sums over processes and dropout differ.
        """
        state = found.state
        for name, now in (("threads", torch.get_num_threads()), ("torch", torch.__version__)):
            if state[name] != now:
                log.warning(
                    "the run had %s %s, now %s: the weights may differ in the last bits", name, state[name], now
                )
        load_weights(self.model, found.weights, str(found.path))
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own_optimizer_state(optimizer, self.model, saved))
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.sampler.set_state(state["sampler"])
        self.step, self.seconds, self.best = found.step, state["seconds"], state["best"]
        self.loss_sum.fill_(state["loss"][0])
        self.loss_steps = state["loss"][1]
        self._restore_random(state["random"])

    def _restore_random(self, states: list[dict[str, Any]]) -> None:
        rank, n = self.accelerator.process_index, self.accelerator.num_processes
        if len(states) != n and self.accelerator.is_main_process:
            change = (
                "the checkpoint is of %d processes, now there are %d: from step %d on the run is not bitwise the same"
            )
            log.warning(f"{change} (order of sums, dropout)", len(states), n, self.step)
        if rank < len(states):
            set_random_state(states[rank])
        else:
            seed_everything(int(np.random.SeedSequence((self.config.seed, rank, self.step)).generate_state(1)[0]))
