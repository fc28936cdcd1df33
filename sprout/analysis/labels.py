"""What could drive a neuron: a label for each position of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unicodedata import combining

import numpy as np
import torch

KINDS = ("current character", "next character", "character class", "place in word")
_PLACES = ("between words", *(f"letter {i}" for i in range(1, 8)), "letter 8 or later")
_NAMES = {" ": "space", "\n": "newline", "\t": "tab", "\r": "return", "\N{NO-BREAK SPACE}": "no-break space"}


class Labels(NamedTuple):
    """kind, one of KINDS; names of the L labels that occur; index (P,) int64 in 0..L-1, the label of each position."""

    kind: str
    names: list[str]
    index: np.ndarray


def label(text: str, where: np.ndarray, kind: str = KINDS[0]) -> Labels:
    """Labels of some positions of a text.

    Args:
        text: the whole text.
        where: (P,) integer in 0..len(text)-1, the character in which each position's token ends (``character_of``).
        kind: "current character": that character. "next character": the one after it, or "end of text". "character
            class": lower case, upper case, other letter, digit, space, newline, punctuation (signs too) or other.
            "place in word": letter 1, 2, ... of a run of letters, digits and "_", or between words.
    Raises: ValueError for an unknown kind or a position outside the text.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    where = np.asarray(where)
    if where.size and (where.min() < 0 or where.max() >= len(text)):
        raise ValueError(f"where must be in 0..{len(text) - 1}, got values from {where.min()} to {where.max()}")
    if kind == "place in word":
        values = [_PLACES[place] for place in _places(text)]
    elif kind == "character class":
        values = [_class(character) for character in text]
    else:
        values = [shown(character) for character in text]
        if kind == "next character":
            values = [*values[1:], "end of text"]
    names, index = np.unique(np.array(values, dtype=object)[where].astype(str), return_inverse=True)
    return Labels(kind, names.tolist(), index.astype(np.int64))


def shown(character: str) -> str:
    """A character as text can show it: itself, the name of a blank, or its number (U+200B)."""
    if character in _NAMES:
        return _NAMES[character]
    known = ord(character) < 0x500 or 0x2010 <= ord(character) <= 0x2027  # every sans serif font has these
    return character if character.isprintable() and known and not combining(character) else f"U+{ord(character):04X}"


def _class(character: str) -> str:
    if character == "\n":
        return "newline"
    for name, holds in (
        ("space", character.isspace),
        ("lower case", character.islower),
        ("upper case", character.isupper),
        ("other letter", character.isalpha),
        ("digit", character.isdigit),
        ("punctuation", character.isprintable),
    ):
        if holds():
            return name
    return "other"


def _places(text: str) -> list[int]:
    places, place = [], 0
    for character in text:
        place = min(place + 1, len(_PLACES) - 1) if character.isalnum() or character == "_" else 0
        places.append(place)
    return places


def character_of(text: str, tokens: torch.Tensor, decode: Callable[[torch.Tensor], str] | None = None) -> np.ndarray:
    """The character in which each token ends: (L,) int64 in 0..len(text)-1, ascending.

    Tokens may be the text's characters or its UTF-8 bytes, which their number tells; for any others decode finds out
    (a character that several tokens share belongs to all of them).
    Args: text; tokens (L,) int64, of the whole text; decode, from tokens (1..8,) to their text.
    Raises: ValueError if the tokens are neither and there is no decode, or what it gives is not the text.
    """
    if len(tokens) == len(text):
        return np.arange(len(text))
    sizes = [len(character.encode("utf-8", errors="surrogatepass")) for character in text]
    if len(tokens) == sum(sizes):
        return np.repeat(np.arange(len(text)), sizes)
    if decode is None:
        raise ValueError(
            f"encode gave {len(tokens)} tokens for {len(text)} characters and {sum(sizes)} bytes; "
            "pass the tokenizer itself, with its decode, so that tokens find their characters"
        )
    return _aligned(text, tokens.tolist(), decode)


def _aligned(text: str, tokens: Sequence[int], decode: Callable[[torch.Tensor], Any]) -> np.ndarray:
    where, group, begin, known = np.zeros(len(tokens), dtype=np.int64), [], 0, {}
    for i, token in enumerate(tokens):
        group.append(token)
        key = tuple(group)
        if key not in known:
            known[key] = decode(torch.tensor(group))
        # Half a character decodes to U+FFFD, which the text does not hold here: wait for the other half.
        if text.startswith(known[key], begin) and known[key]:
            begin += len(known[key])
            where[i - len(group) + 1 : i + 1] = begin - 1
            group = []
        elif len(group) > 8:
            raise ValueError(
                f"encode's tokens {group} at {i - 8} decode to {known[key]!r}, which is not the text's "
                f"{text[begin : begin + 20]!r}; the analysis needs a tokenizer that gives the text back"
            )
    where[len(tokens) - len(group) :] = max(begin - 1, 0)
    return where
