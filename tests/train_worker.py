"""sprout.train with a fault, as a process of its own: python -m tests.train_worker FAULT options of sprout.train ...

FAULT: die, the second process is gone in step 6; apart, each process's plasticity is its own; spoil, a row that the
second process alone holds is NaN after step 6; none.
Each process that gets to the end leaves the connection strengths in the file OUT.RANK, unless they are spread.
"""

from __future__ import annotations

import math
import os
import sys
from functools import partial

import torch

from sprout import train
from sprout.train_loop import Loop
from sprout.trainer import Trainer

RANK = os.environ.get("RANK", "0")


def dies(step, self):
    if RANK == "1" and self.step == 5:
        os._exit(3)
    return step(self)


def spoils(step, self):
    facts = step(self)
    if self.step == 6:
        self.model.pool.group_threshold.data[-1] = -1e9  # nobody chooses its neurons
        if RANK == "1":
            self.model.pool.neuron_signatures.local.data[-1] = math.nan
    return facts


def alone(begin, self, *arguments):
    begin(self, *arguments)
    self.model.plasticity = partial(self.model.plasticity, process_group="local")


def kept(out, end, self, figures):
    if isinstance(self.trainer.model.pool.connection_strength, torch.Tensor):
        torch.save(self.trainer.model.pool.connection_strength.detach(), f"{out}.{RANK}")
    end(self, figures)


def replace(owner, name, wrapper):
    """Puts a wrapper around a method."""
    before = getattr(owner, name)
    setattr(owner, name, lambda self, *arguments: wrapper(before, self, *arguments))


if __name__ == "__main__":
    fault, *options = sys.argv[1:]
    if fault == "die":
        replace(Trainer, "train_step", dies)
    if fault == "spoil":
        replace(Trainer, "train_step", spoils)
    if fault == "apart":
        replace(Trainer, "__init__", alone)
    replace(Loop, "_finish", partial(kept, options[options.index("--out") + 1]))
    sys.exit(train.main(options))
