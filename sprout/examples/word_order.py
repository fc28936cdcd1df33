"""Real text, in its order or locally shuffled: paragraphs of the embedded corpus, twelve words at a time.

    class 0    the value of the | expression is used as | the name of an
    class 1    value of the the | is as expression used | of name the an      shuffled within each run of four

Both classes hold the same words, so that no bag of words can tell them apart, however it is trained: in the validation
set every passage stands once in each class, and a judge who does not see the order is right in exactly one half.
Words are lower-case, a punctuation mark is a word, and only the commonest are told apart: which words stand side by
side shows in a few frequent ones ("of the", not "the of").
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

from .common import vocabulary

LENGTH, RUN = 12, 4  # words of a passage, and of a run within which they are shuffled
VOCABULARY = 128
PROSE = 0.7  # of a paragraph's words and marks at least so many are words: no code, no tables
HELD_OUT = 5  # one paragraph in so many is of the validation side
SHARED = 8  # no validation passage has so many words in a row that stand in a training paragraph


class Passages(NamedTuple):
    """train: (M, LENGTH) int64, every window of the training paragraphs. validation: (P, LENGTH) int64, one after the
    other from the rest. vocabulary: the number of each of the commonest training words; 0 is any other word.
    """

    train: Tensor
    validation: Tensor
    vocabulary: dict[str, int]


def paragraphs(text: str) -> list[list[str]]:
    """The distinct paragraphs of prose, in order, as lower-case words and marks; at least LENGTH of them."""
    distinct = dict.fromkeys(" ".join(p.split()).lower() for p in re.split(r"\n\s*\n", text))
    words = [re.findall(r"\w+|[^\w\s]", paragraph) for paragraph in distinct]
    return [p for p in words if len(p) >= LENGTH and sum(w.isalpha() for w in p) >= PROSE * len(p)]


def held_out(words: list[str]) -> bool:
    """Whether a paragraph is of the validation side: by the hash of its words alone."""
    return sha256(" ".join(words).encode()).digest()[0] % HELD_OUT == 0


def split(text: str) -> Passages:
    """The passages of both sides; the same text gives the same ones. Raises: ValueError if a side is empty."""
    train, validation = [], []
    for words in paragraphs(text):
        (validation if held_out(words) else train).append(words)
    seen = {run for words in train for run in _runs(words, SHARED)}
    kept = [
        passage
        for words in validation
        for passage in _runs(words, LENGTH, LENGTH)
        if seen.isdisjoint(_runs(list(passage), SHARED))
    ]
    if not train or not kept:
        raise ValueError(f"text must have prose for both sides, got {len(train)} training paragraphs, {len(kept)} kept")
    number = vocabulary((word for words in train for word in words), VOCABULARY)
    windows = [passage for words in train for passage in _runs(words, LENGTH)]
    numbered, rest = (torch.tensor([[number.get(w, 0) for w in p] for p in side]) for side in (windows, kept))
    return Passages(numbered, rest, number)


def shuffled(passages: Tensor, generator: torch.Generator) -> Tensor:
    """(M, LENGTH) int64, each run of RUN words in an order drawn at random; the words of a run stay in it."""
    runs = passages.unflatten(1, (-1, RUN))
    return runs.gather(2, torch.rand(runs.shape, generator=generator).argsort(2)).flatten(1)


def batch(passages: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random passages for training: tokens (size, LENGTH) int64, size even: size / 2 in order, then each of them
    shuffled, so that only the order can lower the loss; labels (size,) int64.

    About one shuffle in a thousand leaves the order as it was (repeated words); its label is class 1 all the same.
    """
    written = passages[torch.randint(len(passages), (size // 2,), generator=generator)]
    labels = torch.tensor([0, 1]).repeat_interleave(size // 2)
    return torch.cat([written, shuffled(written, generator)]), labels


def pairs(passages: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Each passage in both classes, for judging: tokens (2 P, LENGTH) int64, labels (2 P,) int64.

    Passages that the shuffle left as they were (repeated words) are left out of both.
    """
    other = shuffled(passages, torch.Generator().manual_seed(seed))
    changed = (other != passages).any(1)
    tokens = torch.cat([passages[changed], other[changed]])
    return tokens, (torch.arange(len(tokens)) >= len(tokens) // 2).long()


def _runs(words: list[str], length: int, stride: int = 1) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + length]) for i in range(0, len(words) - length + 1, stride)]
