"""What every task shares: the batch, the protocol, the vocabulary, and the rule that keeps the splits apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

PAD, COPY, REVERSE, SORT, RECALL, SEP, EOS = range(7)
NOISE, ITEMS, KEYS = range(7, 11), range(11, 37), range(37, 101)
VOCAB_SIZE = 101
IGNORE = -100
SPLITS = ("train", "id", "ood", "hard", "extreme")

SYMBOLS = (
    *("pad", "COPY", "REVERSE", "SORT", "RECALL", "SEP", "EOS"),
    *(f"~{i + 1}" for i in range(len(NOISE))),
    *(chr(ord("a") + i) for i in range(len(ITEMS))),
    *(f"k{i + 1}" for i in range(len(KEYS))),
)

HELD_OUT_SHARE = 0.1
_PRIME, _BASE, _FACTOR = 2**31 - 1, 1_103_515_245, 1_664_525
_ROUNDS = 200  # of proposals, of which even a held-out split keeps about all it misses in two


class Batch(NamedTuple):
    """Sequences of a task; shorter ones are padded on the right.

    tokens: (B, T) int64, the input stream, 0 <= tokens < vocab_size; PAD = 0 behind the end.
    targets: (B, T) int64, the token to predict at this position, IGNORE = -100 where nothing is scored.
    given: (B, T) bool, True where the environment supplies tokens[b, t]; False where tokens[b, t] is the model's own
        answer at t - 1: here the right one (teacher forcing), in free running what the model predicted.
    """

    tokens: Tensor
    targets: Tensor
    given: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(tensor.to(device) for tensor in self))

    def scored(self) -> Tensor:
        """(B, T) bool: where there is something to predict."""
        return self.targets != IGNORE


@runtime_checkable
class Task(Protocol):
    """What the experiments need of a task; any class with these members is one.

    name: for tables and folders. vocab_size: V, tokens and targets are below it. splits: names that ``sample`` takes;
    training draws from "train".
    """

    name: str
    vocab_size: int
    splits: tuple[str, ...]

    def sample(self, split: str, n: int, generator: torch.Generator) -> Batch:
        """n fresh sequences on the generator's device; the generator's state alone decides which."""
        ...

    def describe(self, tokens: Iterable[int] | Tensor) -> list[str]:
        """The name of each symbol of one sequence, for pictures."""
        ...


def check_request(splits: tuple[str, ...], split: str, n: int, generator: torch.Generator) -> None:
    """Raises ValueError or TypeError for an argument of ``Task.sample`` that is not allowed."""
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, got {split!r}")
    if type(n) is not int or n < 1:
        raise ValueError(f"n must be an integer >= 1, got {n!r}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def describe(tokens: Iterable[int] | Tensor) -> list[str]:
    """Names of the symbols of copy, reverse, sort and recall. Raises: ValueError for what is not a token of theirs."""
    return [SYMBOLS[token] for token in checked_tokens(tokens, VOCAB_SIZE)]


def checked_tokens(tokens: Iterable[int] | Tensor, vocab_size: int) -> list[int]:
    """tokens (T,) as a list. Raises: ValueError if it is not 1-D or holds a token out of 0..vocab_size-1."""
    listed = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    if not isinstance(listed, list):
        raise ValueError("tokens must be (T,), got a single number")
    for token in listed:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"tokens must be (T,) integers in 0..{vocab_size - 1}, got {token!r}")
    return listed


@cache
def _weights(length: int) -> Tensor:
    return torch.tensor([pow(_BASE, i + 1, _PRIME) for i in range(length)])


def held_out(question: Tensor) -> Tensor:
    """(B,) bool: whether a question belongs to the tenth that training never sees.

    A polynomial hash modulo 2^31 - 1, stirred and reduced modulo ten. No product reaches 2^62, so that no machine
    rounds or wraps: the same question is on the same side everywhere.

    Args: question (B, L) int64 >= 0; 0 is padding and changes nothing, wherever L ends.
    """
    h = (question % _PRIME * _weights(question.shape[1]).to(question.device) % _PRIME).sum(1) % _PRIME
    for shift in (15, 13):
        h = (h ^ (h >> shift)) * _FACTOR % _PRIME
    return (h >> 4) % 10 == 0


def draw(n: int, train: bool, propose: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The first n proposals on the right side of ``held_out``; a rejected one is drawn again, whole.

    Args: propose(m) draws m candidates: a tuple of tensors (m, ...), the first of them the question.
    Returns: the tuple with n rows. Raises: ValueError if there are next to no questions on that side.
    """
    kept, missing = [], n
    share = 1 - HELD_OUT_SHARE if train else HELD_OUT_SHARE
    for _ in range(_ROUNDS):
        proposal = propose(int(1.1 * missing / share) + 4)
        right = (held_out(proposal[0]) != train).nonzero().squeeze(1)[:missing]
        kept.append([tensor[right] for tensor in proposal])
        missing -= len(right)
        if missing == 0:
            return tuple(torch.cat(parts) for parts in zip(*kept, strict=True))
    side = "train" if train else "held-out"
    raise ValueError(f"the task has too few questions: {missing} of {n} on the {side} side were not found")


def at(rows: Tensor, index: Tensor, where: Tensor) -> Tensor:
    """(B, T): rows (B, L) read at index (B, T) where that is True, elsewhere 0; there the index may be anything."""
    return rows.gather(1, index.clamp(0, rows.shape[1] - 1)) * where
