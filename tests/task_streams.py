"""The streams of the tasks in plain Python, from the question in a row of tokens: what the tests compare with."""

from __future__ import annotations

from biohama.tasks import EOS, IGNORE, KEYS, PAD, SEP, Batch

Row = tuple[list[int], list[int], list[bool]]


def rows(batch: Batch) -> zip:
    """(tokens, targets, given) of each sequence, as lists."""
    return zip(*(tensor.tolist() for tensor in batch), strict=True)


def items_of(tokens: list[int]) -> list[int]:
    """What stands between the task token and SEP."""
    return tokens[1 : tokens.index(SEP)]


def facts_of(tokens: list[int]) -> list[tuple[int, int]]:
    """(key, value) of recall, as told."""
    told = [token for token in items_of([int(token) for token in tokens]) if token > 10]  # no noise
    return list(zip(told[::2], told[1::2], strict=True))


def question(name: str, tokens: list[int]) -> tuple[int, ...] | frozenset[tuple[int, int]]:
    """What decides the side of the split."""
    if name == "recall":
        return frozenset(facts_of(tokens))
    if name == "mqar":
        return frozenset(told_first(tokens))
    return tuple(items_of(tokens))


def told_first(tokens: list[int], n_keys: int = 127) -> list[tuple[int, int]]:
    """(key, value) of MQAR: pairs until a key comes again or what stands there is no pair."""
    facts: dict[int, int] = {}
    for key, value in zip(tokens[::2], tokens[1::2], strict=False):
        if not (1 <= key <= n_keys < value) or key in facts:
            break
        facts[key] = value
    return list(facts.items())


def _stream(tokens: list[int], answer: list[int]) -> Row:
    asked = tokens[: tokens.index(SEP) + 1]
    targets = [IGNORE] * (len(asked) - 1) + answer + [EOS]
    return asked + answer, targets, [True] * len(asked) + [False] * len(answer)


def _recall(tokens: list[int]) -> Row:
    """The order of the questions is the row's own; that each key is asked for once is checked here."""
    facts, start = dict(facts_of(tokens)), tokens.index(SEP) + 1
    noise = items_of(tokens)[2 * len(facts) :]
    assert all(7 <= token <= 10 for token in noise)
    assert all(key in KEYS for key in facts)
    asked = tokens[start : start + 2 * len(facts) : 2]
    assert sorted(asked) == sorted(facts)
    assert PAD not in asked
    told = [token for pair in facts.items() for token in pair]
    answered = [token for key in asked for token in (key, facts[key])]
    targets = [IGNORE] * start + [token for key in asked for token in (facts[key], IGNORE)]
    stream = [tokens[0], *told, *noise, SEP, *answered]
    return stream, targets, [True] * start + [True, False] * len(facts)


PLAIN = {
    "copy": lambda tokens: _stream(tokens, items_of(tokens)),
    "reverse": lambda tokens: _stream(tokens, items_of(tokens)[::-1]),
    "sort": lambda tokens: _stream(tokens, sorted(items_of(tokens))),
    "recall": _recall,
}
