"""Copy, reverse and sort: a stream of items, then the same items in the order that the task token asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from . import base
from .base import COPY, EOS, IGNORE, ITEMS, REVERSE, SEP, SORT, SPLITS, Batch, at, check_request, draw

LENGTHS = {"train": (3, 10), "id": (3, 10), "ood": (11, 20), "hard": (21, 40), "extreme": (91, 100)}


class Stream:
    """``TASK x1 .. xn SEP y1 .. yn``, the answer y a rearrangement of x that ends with EOS, which is never an input.

    Items are drawn with replacement, so duplicates are common; n is drawn for each sequence from the split's range in
    LENGTHS. The question is x1 .. xn: whatever is asked of it, its side of the split is the same.
    """

    name: str
    token: int
    vocab_size = base.VOCAB_SIZE
    splits = SPLITS
    describe = staticmethod(base.describe)

    def answer(self, x: Tensor, n: Tensor) -> Tensor:
        """y (B, N) int64 of x (B, N) with n (B, 1) items in each row; what stands behind the n-th is not read."""
        raise NotImplementedError

    def sample(self, split: str, n: int, generator: torch.Generator) -> Batch:
        """n fresh sequences. Args: split, one of ``splits``; n >= 1. Returns: a Batch, T = 2 * longest + 2.

        Raises: ValueError or TypeError naming the argument. Determinism: the generator's state decides.
        """
        check_request(self.splits, split, n, generator)
        (low, high), device = LENGTHS[split], generator.device

        def propose(m: int) -> tuple[Tensor, Tensor]:
            length = torch.randint(low, high + 1, (m, 1), generator=generator, device=device)
            x = torch.randint(ITEMS.start, ITEMS.stop, (m, high), generator=generator, device=device)
            return x * (torch.arange(high, device=device) < length), length

        x, length = draw(n, split == "train", propose)
        return self._lay_out(x[:, : int(length.max())], length)

    def _lay_out(self, x: Tensor, n: Tensor) -> Batch:
        """Stream and targets of items x (B, N), zeros behind the n-th (B, 1)."""
        t = torch.arange(2 * x.shape[1] + 2, device=x.device).expand(len(x), -1)
        y = self.answer(x, n)
        asked, answered = t > n, t > n + 1  # from SEP on, and from y1 on
        inside = t < 2 * n + 2
        tokens = at(x, t - 1, (t > 0) & ~asked) + at(y, t - n - 2, answered & inside)
        tokens = tokens + self.token * (t == 0) + SEP * (t == n + 1)
        targets = at(y, t - n - 1, asked & (t < 2 * n + 1)) + EOS * (t == 2 * n + 1)
        return Batch(tokens, targets.masked_fill(~(asked & inside), IGNORE), ~(answered & inside))


class Copy(Stream):
    """The items again::

    tokens   COPY  b  a  b SEP  b  a  b
    targets     .  .  .  .   b  a  b EOS
    given       1  1  1  1   1  0  0  0
    """

    name, token = "copy", COPY

    def answer(self, x: Tensor, n: Tensor) -> Tensor:
        return x


class Reverse(Stream):
    """The items from last to first::

    tokens   REVERSE  b  a  c SEP  c  a  b
    targets        .  .  .  .   c  a  b EOS
    given          1  1  1  1   1  0  0  0
    """

    name, token = "reverse", REVERSE

    def answer(self, x: Tensor, n: Tensor) -> Tensor:
        back = n - 1 - torch.arange(x.shape[1], device=x.device)
        return at(x, back, back >= 0)


class Sort(Stream):
    """The items in ascending order, equal ones as often as they came::

    tokens   SORT  b  a  b SEP  a  b  b
    targets     .  .  .  .   a  b  b EOS
    given       1  1  1  1   1  0  0  0
    """

    name, token = "sort", SORT

    def answer(self, x: Tensor, n: Tensor) -> Tensor:
        inside = torch.arange(x.shape[1], device=x.device) < n
        return x.masked_fill(~inside, ITEMS.stop).sort(1).values * inside
