"""Multi-query associative recall: the pairs first, then the keys again, at distances that follow a power law."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite

import torch
from torch import Tensor

from .base import IGNORE, SPLITS, Batch, check_request, checked_tokens, draw
from .recall import facts, shuffled

LENGTHS = {"train": 64, "id": 64, "ood": 128, "hard": 256, "extreme": 640}
PAIRS = {"train": (4, 8), "id": (4, 8), "ood": (16, 16), "hard": (32, 32), "extreme": (64, 64)}


class MQAR:
    """``k1 v1 .. kn vn`` and then a stretch of fillers in which each key comes once more::

        tokens   k3 v7 k1 v2 f k1 f f k3 f f f
        targets   .  .  .  . . v2 . . v7 . . .
        given     1  1  1  1 1  1 1 1  1 1 1 1

    Half of the symbols are keys, half values; the keys of a sequence are distinct. A key may be asked for at every
    second place behind the pairs; the i-th of these places is taken with probability ~ i^(power_a - 1), no place
    twice, so that a small power_a asks soon after the pairs and 1 asks anywhere. Fillers are any symbols except the
    sequence's own keys. The environment supplies every token; only queries are scored. The question that decides the
    side of the split is the set of pairs. After Arora et al. 2023 (arXiv 2312.04927).

    vocab_size: V; PAD is 0, keys 1..(V-1)//2, values the rest.
    lengths: T of each split; pairs: (fewest, most) n of each split, both with the same splits, "train" among them.
    power_a: exponent of the power law, > 0, dimensionless.
    """

    name = "mqar"

    def __init__(
        self,
        vocab_size: int = 256,
        lengths: Mapping[str, int] | None = None,
        pairs: Mapping[str, tuple[int, int]] | None = None,
        power_a: float = 0.01,
    ) -> None:
        """Raises: ValueError naming the option, what was given and what is allowed."""
        if type(vocab_size) is not int or vocab_size < 4:
            raise ValueError(f"vocab_size must be an integer >= 4, got {vocab_size!r}")
        if type(power_a) not in (int, float) or not isfinite(power_a) or power_a <= 0:
            raise ValueError(f"power_a must be a finite number > 0, got {power_a!r}")
        self.vocab_size, self.n_keys, self.power_a = vocab_size, (vocab_size - 1) // 2, power_a
        self.lengths = dict(LENGTHS if lengths is None else lengths)
        self.pairs = {split: tuple(span) for split, span in (PAIRS if pairs is None else pairs).items()}
        self.splits = tuple(sorted(self.lengths, key=lambda s: SPLITS.index(s) if s in SPLITS else len(SPLITS)))
        if set(self.lengths) != set(self.pairs) or "train" not in self.splits:
            raise ValueError(
                f'lengths and pairs must have the same splits, "train" among them, got {list(self.lengths)} '
                f"and {list(self.pairs)}"
            )
        for split in self.splits:
            self._check(split)

    def _check(self, split: str) -> None:
        length, span = self.lengths[split], self.pairs[split]
        if type(length) is not int or length < 4:
            raise ValueError(f"lengths[{split!r}] must be an integer >= 4, got {length!r}")
        most = min(self.n_keys, length // 4)
        if len(span) != 2 or any(type(n) is not int for n in span) or not 1 <= span[0] <= span[1] <= most:
            raise ValueError(
                f"pairs[{split!r}] must be (fewest, most) in 1..{most}, at most the {self.n_keys} keys and "
                f"a quarter of the length {length}, got {span!r}"
            )

    def describe(self, tokens: Iterable[int] | Tensor) -> list[str]:
        """Names of the symbols of one sequence. Raises: ValueError for what is not a token."""
        names = ["pad", *(f"k{i + 1}" for i in range(self.n_keys))]
        names += [f"v{i + 1}" for i in range(self.vocab_size - len(names))]
        return [names[token] for token in checked_tokens(tokens, self.vocab_size)]

    def sample(self, split: str, n: int, generator: torch.Generator) -> Batch:
        """n fresh sequences. Args: split, one of ``splits``; n >= 1. Returns: a Batch, T = lengths[split].

        Raises: ValueError or TypeError naming the argument. Determinism: the generator's state decides.
        """
        check_request(self.splits, split, n, generator)
        (low, high), device = self.pairs[split], generator.device
        n_values = self.vocab_size - 1 - self.n_keys

        def propose(m: int) -> tuple[Tensor, ...]:
            count = torch.randint(low, high + 1, (m, 1), generator=generator, device=device)
            inside = torch.arange(high, device=device) < count
            order = 1 + shuffled(m, self.n_keys, generator)  # the first count are the keys, the others fill
            values = 1 + self.n_keys + torch.randint(n_values, (m, high), generator=generator, device=device)
            keys, values = order[:, :high] * inside, values * inside
            return facts(keys, values, self.vocab_size), count, keys, values, order

        _, count, keys, values, order = draw(n, split == "train", propose)
        length = self.lengths[split]
        free = self.vocab_size - 1 - count  # symbols that are not keys of the sequence
        pick = torch.rand(n, length, generator=generator, device=device)
        pick = count + (pick * free).long().clamp(max=free - 1)
        symbols = torch.cat([order, torch.arange(1 + self.n_keys, self.vocab_size, device=device).expand(n, -1)], 1)
        places = self._places(length, count, high, generator)
        return self._lay_out(symbols.gather(1, pick), keys, values, 2 * count + 2 * places)

    def _places(self, length: int, count: Tensor, high: int, generator: torch.Generator) -> Tensor:
        """(B, high) int64: the place where each pair's key is asked for, from 0 in steps of two tokens."""
        i = torch.arange(1, length // 2 - int(count.min()) + 1, device=generator.device, dtype=torch.float64)
        weight = i ** (self.power_a - 1) * (i <= length // 2 - count)
        return torch.multinomial(weight, high, generator=generator)

    def _lay_out(self, tokens: Tensor, keys: Tensor, values: Tensor, asked: Tensor) -> Batch:
        """tokens (B, T): fillers; keys, values (B, N): zeros where there is no pair; asked (B, N): query places."""
        told, pair = torch.stack([keys, values], 2).flatten(1), keys > 0
        tokens[:, : told.shape[1]] = torch.where(told > 0, told, tokens[:, : told.shape[1]])
        targets = torch.full_like(tokens, IGNORE)
        row = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(asked)[pair]
        tokens[row, asked[pair]] = keys[pair]
        targets[row, asked[pair]] = values[pair]
        return Batch(tokens, targets, torch.ones_like(tokens, dtype=torch.bool))
