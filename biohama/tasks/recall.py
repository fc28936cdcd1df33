"""Delayed associative recall: facts, a stretch of noise, then every key is asked for once."""

from __future__ import annotations

import torch
from torch import Tensor

from . import base
from .base import IGNORE, ITEMS, KEYS, NOISE, RECALL, SEP, SPLITS, Batch, at, check_request, draw

PAIRS = {"train": (2, 6), "id": (2, 6), "ood": (7, 12), "hard": (13, 24), "extreme": (51, 60)}
DELAYS = {"train": (2, 10), "id": (2, 10), "ood": (11, 20), "hard": (21, 40), "extreme": (91, 100)}


class Recall:
    """``RECALL k1 v1 .. kn vn noise*d SEP q1 v(q1) .. qn v(qn)``: at each q its value is to be predicted::

        tokens   RECALL k3  b k1  a ~2 ~4 SEP k1  a k3  b
        targets       .  .  .  .  .  .  .   .  a  .  b  .
        given         1  1  1  1  1  1  1   1  1  0  1  0

    The keys of a sequence are distinct, its values are items drawn with replacement, the n keys are asked for in random
    order. n and d are drawn for each sequence from the split's ranges, PAIRS and DELAYS. There is no EOS: the questions
    end with the stream. The question that decides the side of the split is the set of pairs: the same facts told in
    another order are the same question.
    """

    name = "recall"
    vocab_size = base.VOCAB_SIZE
    splits = SPLITS
    describe = staticmethod(base.describe)

    def sample(self, split: str, n: int, generator: torch.Generator) -> Batch:
        """n fresh sequences. Args: split, one of ``splits``; n >= 1. Returns: a Batch, T of the longest 4 n + d + 2.

        Raises: ValueError or TypeError naming the argument. Determinism: the generator's state decides.
        """
        check_request(self.splits, split, n, generator)
        (low, high), delays, device = PAIRS[split], DELAYS[split], generator.device

        def propose(m: int) -> tuple[Tensor, ...]:
            count = torch.randint(low, high + 1, (m, 1), generator=generator, device=device)
            inside = torch.arange(high, device=device) < count
            keys = (KEYS.start + shuffled(m, len(KEYS), generator)[:, :high]) * inside
            values = torch.randint(ITEMS.start, ITEMS.stop, (m, high), generator=generator, device=device) * inside
            return facts(keys, values, self.vocab_size), count, keys, values

        _, count, keys, values = draw(n, split == "train", propose)
        delay = torch.randint(delays[0], delays[1] + 1, (n, 1), generator=generator, device=device)
        noise = torch.randint(NOISE.start, NOISE.stop, (n, delays[1]), generator=generator, device=device)
        order = shuffled(n, high, generator, count)
        return self._lay_out((keys, values, count), (noise, delay), order)

    def _lay_out(self, pairs: tuple[Tensor, Tensor, Tensor], noise: tuple[Tensor, Tensor], order: Tensor) -> Batch:
        """Stream and targets of (keys (B, N), values (B, N), n (B, 1)) and (noise (B, D), d (B, 1)).

        order: (B, N) int64, its first n entries are the pairs in the order in which they are asked for.
        """
        (keys, values, n), (filler, d) = pairs, noise
        sep = 2 * n + d + 1
        end = sep + 2 * n + 1
        t = torch.arange(int(end.max()), device=keys.device).expand(len(keys), -1)
        told = torch.stack([keys, values], 2).flatten(1)
        key, value = keys.gather(1, order), values.gather(1, order)
        asked = torch.stack([key, value], 2).flatten(1)
        behind = (t > sep) & (t < end)
        query = behind & ((t - sep) % 2 == 1)
        tokens = at(told, t - 1, (t > 0) & (t <= 2 * n)) + at(filler, t - 2 * n - 1, (t > 2 * n) & (t < sep))
        tokens = tokens + at(asked, t - sep - 1, behind) + RECALL * (t == 0) + SEP * (t == sep)
        targets = at(value, (t - sep - 1) // 2, query).masked_fill(~query, IGNORE)
        return Batch(tokens, targets, ~behind | query)


def shuffled(rows: int, width: int, generator: torch.Generator, count: Tensor | None = None) -> Tensor:
    """(rows, width) int64: random orders of 0..width-1; with count (rows, 1), those of 0..count-1 come first."""
    at_random = torch.rand(rows, width, generator=generator, device=generator.device)
    if count is not None:
        at_random = at_random + (torch.arange(width, device=generator.device) >= count)
    return at_random.argsort(1)


def facts(keys: Tensor, values: Tensor, vocab_size: int) -> Tensor:
    """(B, N) int64, a set of pairs as a question: the same whatever the order of the pairs; absent pairs are zeros."""
    return (keys * vocab_size + values).sort(1, descending=True).values
