"""One training step, what it depends on, and its state."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from accelerate import Accelerator

from sprout.runs import Checkpoint, RunError, random_state, set_random_state

from ..objective import training_loss
from ..tasks import Batch, Task
from .build import build_model, load_weights, newest_weights
from .config import Config
from .evaluate import exact, split_generator

log = logging.getLogger("biohama.experiments")
CHECKED = 100  # sequences of train.check_every


def schedule(step: int, total: int, warmup_steps: int) -> float:
    """Share of the highest learning rate in step 0..total-1: a linear warm-up to 1, in the last 0.3 linear to 0, but
    not below 0.05; the lower of the two where a long warm-up meets the end.

    It is still high when BioHama is decided, so that what hangs on that can follow. Source: Hu et al. 2024, MiniCPM
    (arXiv 2404.06395).
    """
    return min(1.0, (step + 1) / max(1, warmup_steps), max(0.05, (total - step) / (0.3 * total)))


class Trainer:
    """The model of a run with all that a step needs."""

    def __init__(self, config: Config, task: Task, accelerator: Accelerator) -> None:
        self.config, self.options, self.task, self.accelerator = config, config.train, task, accelerator
        model = build_model(config.model, task.vocab_size)
        if config.init is not None:
            load_weights(model, newest_weights(config.init), config.init)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.options.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.sampler = torch.Generator().manual_seed(config.seed)
        self.step, self.seconds, self.done = 0, 0.0, False
        self.loss_sum, self.loss_steps = torch.zeros((), dtype=torch.float64, device=accelerator.device), 0

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on fresh sequences."""
        o = self.options
        lr = o.lr * schedule(self.step, o.steps, o.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = Batch(*self.task.sample("train", o.batch_size, self.sampler)).to(self.accelerator.device)
        loss, parts = training_loss(self.model, batch, self.step / o.steps, o.without)
        self.accelerator.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, o.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss_sum += loss.detach()
        self.loss_steps += 1
        self.step += 1
        return {"lr": lr, "grad_norm": norm, **{name: value for name, value in parts.items() if name != "loss"}}

    @property
    def finished(self) -> bool:
        return self.done or self.step >= self.options.steps

    def check(self) -> float:
        """Seq-Acc, teacher-forced, of fresh sequences of the training split, the same ones every time."""
        batch = self.task.sample("train", CHECKED, split_generator(self.config.evaluation.seed, "check"))
        return float(exact(self.model, Batch(*batch), self.config.evaluation.batch_size).double().mean())

    def mean_loss(self) -> float:
        """Mean loss in nats since the last call. Raises: RunError if it is not finite."""
        mean = float(self.loss_sum) / max(1, self.loss_steps)
        if not math.isfinite(mean):
            raise RunError(f"the loss is not finite before step {self.step}; lower train.lr or set train.clip")
        self.loss_sum.zero_()
        self.loss_steps = 0
        return mean

    def checkpoint(self) -> Checkpoint:
        """What ``restore`` continues from. Raises: RunError if a weight is not finite."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise RunError(f"a weight is not finite at step {self.step}; lower train.lr or set train.clip")
        state = {
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.get_state(),
            "random": random_state(),
            "seconds": self.seconds,
            "done": self.done,
            "loss": [float(self.loss_sum), self.loss_steps],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        return Checkpoint(self.step, self.model.state_dict(), state)

    def restore(self, found: Checkpoint) -> None:
        """Continues where a checkpoint was made. Raises: RunError if it is another model's."""
        state = found.state
        for name, now in (("threads", torch.get_num_threads()), ("torch", torch.__version__)):
            if state[name] != now:
                log.warning("the run had %s %s, now %s: the last bits may differ", name, state[name], now)
        load_weights(self.model, found.weights, found.path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.set_state(state["sampler"])
        self.step, self.seconds, self.done = found.step, state["seconds"], state["done"]
        self.loss_sum.fill_(state["loss"][0])
        self.loss_steps = state["loss"][1]
        set_random_state(state["random"])
