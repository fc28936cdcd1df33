"""Several tasks at once: each sequence comes from one of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import IGNORE, PAD, Batch, Task, check_request


class Mixture:
    """Each sequence is one of a task drawn with probability ~ its weight; the tasks share one vocabulary::

        tokens   COPY  b  a  b SEP  b  a   b        tokens   SORT  c  a  b SEP  a  b   c
        targets     .  .  .  .   b  a  b EOS        targets     .  .  .  .   a  b  c EOS

    tasks: at least one task or name of a task; splits that all of them have are the mixture's.
    weights: one finite number >= 0 for each task, not all 0; None: all alike.
    """

    name = "mixture"

    def __init__(
        self,
        tasks: Sequence[str | Task] = ("copy", "reverse", "sort", "recall"),
        weights: Sequence[float] | None = None,
    ) -> None:
        """Raises: ValueError or TypeError naming the option, what was given and what is allowed."""
        from .choose import make_task

        if isinstance(tasks, str):
            raise TypeError(f"tasks must be a sequence of tasks or their names, got the str {tasks!r}")
        self.tasks = tuple(make_task(task) if isinstance(task, str) else task for task in tasks)
        if not self.tasks:
            raise ValueError("tasks must hold at least one task, got none")
        for task in self.tasks:
            if not isinstance(task, Task):
                raise TypeError(f"tasks must hold tasks or their names, got {type(task).__name__}")
        if len({task.vocab_size for task in self.tasks}) > 1:
            sizes = ", ".join(f"{task.name} {task.vocab_size}" for task in self.tasks)
            raise ValueError(f"tasks must share one vocabulary, got vocab_size of {sizes}")
        self.vocab_size = self.tasks[0].vocab_size
        self.splits = tuple(s for s in self.tasks[0].splits if all(s in task.splits for task in self.tasks))
        if "train" not in self.splits:
            raise ValueError(f'tasks must share the split "train", they share {self.splits}')
        weights = [1.0] * len(self.tasks) if weights is None else list(weights)
        numbers = all(type(w) in (int, float) and isfinite(w) and w >= 0 for w in weights)
        if len(weights) != len(self.tasks) or not numbers or not any(weights):
            raise ValueError(
                f"weights must be {len(self.tasks)} finite numbers >= 0, one for each task and not all 0, got {weights}"
            )
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def describe(self, tokens: Iterable[int] | Tensor) -> list[str]:
        """Names of the symbols, those of the first task: the vocabulary is shared."""
        return self.tasks[0].describe(tokens)

    def sample(self, split: str, n: int, generator: torch.Generator) -> Batch:
        """n fresh sequences, mixed. Args: split, one of ``splits``; n >= 1. Returns: a Batch, T the longest.

        Raises: ValueError or TypeError naming the argument. Determinism: the generator's state decides.
        """
        check_request(self.splits, split, n, generator)
        weights = self.weights.to(generator.device)
        choice = torch.multinomial(weights, n, replacement=True, generator=generator)
        counts = choice.bincount(minlength=len(self.tasks)).tolist()
        parts = [task.sample(split, c, generator) for task, c in zip(self.tasks, counts, strict=True) if c]
        width = max(part.tokens.shape[1] for part in parts)
        whole = [padded(part, width) for part in parts]
        back = choice.argsort(stable=True).argsort()  # row of each sequence among the parts, one task after another
        return Batch(*(torch.cat(tensors)[back] for tensors in zip(*whole, strict=True)))


def padded(batch: Batch, width: int) -> Batch:
    """The batch with T = width; what is added is PAD, given and not scored."""
    more = (0, width - batch.tokens.shape[1])
    return Batch(
        F.pad(batch.tokens, more, value=PAD),
        F.pad(batch.targets, more, value=IGNORE),
        F.pad(batch.given, more, value=True),
    )
