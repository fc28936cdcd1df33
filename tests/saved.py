"""Checkpoints and processes that the tests of runs share."""

import os

import torch

from sprout.runs import Checkpoint


def some(step, score=None, scale=1.0):
    """A checkpoint with what an optimizer's state holds: tensors, tuples, integer keys, None."""
    shared = torch.arange(4.0)
    state = {"state": {0: {"step": torch.tensor(3.0), "m": shared}, 1: {"m": shared}}, "betas": (0.9, 0.99), "x": None}
    weights = {"w": torch.full((3, 2), scale * step).t(), "empty": torch.zeros(0, 2), "b": torch.ones(2).bfloat16()}
    return Checkpoint(step, weights, state, score, {"config.json": "{}"})


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def in_child(function):
    """Runs a function in a forked process. Returns: its exit status, -signal if one killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
