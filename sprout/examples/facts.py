"""Passages of made-up facts with a question about one of them; nothing is downloaded, templates write it all.

    ben studies ancient greek . anna plays chess . ben plays water polo . anna studies law . what is played by ben ?
                                                             ^^^^^^^^^^ the answer, a span of the passage

Three people, what each plays and what each studies, six facts in random order; the answer depends on who and on what is
asked: who reads only which kind of thing is asked for is left with three answers, who reads nothing with six.
A fact is a person and an answer; the hash of its words decides its side, so that no fact of a validation passage stands
in any training passage, though each of its words does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "henry", "ida", "jonas", "karla", "leo")
ANSWERS = {
    "plays": (
        *("chess", "table tennis", "water polo", "the piano", "golf", "jazz guitar"),
        *("rugby", "the drums", "street hockey", "bridge", "the old violin", "poker"),
    ),
    "studies": (
        *("history", "modern art", "organic chemistry", "law", "ancient greek", "physics"),
        *("city planning", "botany", "sea biology", "music theory", "logic", "early roman law"),
    ),
}
QUESTIONS = {"plays": "what is played by {name} ?", "studies": "what is studied by {name} ?"}
RELATIONS = tuple(ANSWERS)
PEOPLE = 3  # in a passage of full size
HELD_OUT = 4  # one fact in so many is of the validation side
LONGEST = max(len(answer.split()) for answers in ANSWERS.values() for answer in answers)
MAX_WORDS = PEOPLE * len(RELATIONS) * (2 + LONGEST + 1) + 6
_TEXTS = (*NAMES, *RELATIONS, *ANSWERS["plays"], *ANSWERS["studies"], *QUESTIONS.values(), ".")
# Words by number; 0 is left for padding.
WORDS = ("", *sorted({word for text in _TEXTS for word in text.replace("{name}", "").split()}))


class Example(NamedTuple):
    """words: passage, then question. span: the answer's first and last word. passage: how many words it has.

    relation: what is asked for. name: about whom.
    """

    words: list[str]
    span: tuple[int, int]
    passage: int
    relation: str
    name: str

    def answer(self) -> str:
        """The answer's words."""
        return " ".join(self.words[self.span[0] : self.span[1] + 1])


def held_out(name: str, answer: str) -> bool:
    """Whether a fact is of the validation side: by the hash of its words alone."""
    return sha256(f"{name} {answer}".encode()).digest()[0] % HELD_OUT == 0


def questions(
    draw: random.Random, *, validation: bool, people: int = PEOPLE, relations: Sequence[str] = RELATIONS
) -> list[Example]:
    """One passage with every question about it; the draws decide, validation says from which side its facts are.

    Args: people in 1..len(NAMES), relations of RELATIONS: people * len(relations) facts, no answer twice.
    """
    facts = None
    while facts is None:  # few validation facts share no answer: draw until they do
        facts = _facts(draw, validation, people, relations)
    words: list[str] = []
    asked = []
    for name, relation, answer in facts:
        first = len(words) + 2
        asked.append((name, relation, (first, first + len(answer.split()) - 1)))
        words += [name, relation, *answer.split(), "."]
    return [
        Example(words + QUESTIONS[relation].format(name=name).split(), span, len(words), relation, name)
        for name, relation, span in asked
    ]


def _facts(
    draw: random.Random, validation: bool, people: int, relations: Sequence[str]
) -> list[tuple[str, str, str]] | None:
    """(name, relation, answer) in random order, or None where a person is left without an answer of their own."""
    facts: list[tuple[str, str, str]] = []
    for name in draw.sample(NAMES, people):
        for relation in relations:
            taken = {answer for _, _, answer in facts}
            free = [a for a in ANSWERS[relation] if held_out(name, a) == validation and a not in taken]
            if not free:
                return None
            facts.append((name, relation, draw.choice(free)))
    draw.shuffle(facts)
    return facts
