"""The tasks: each stream against one written in plain Python, splits that share no question, draws that repeat."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from biohama.tasks import (
    EOS,
    IGNORE,
    ITEMS,
    KEYS,
    NOISE,
    PAD,
    SEP,
    SPLITS,
    TASKS,
    VOCAB_SIZE,
    Copy,
    Mixture,
    Recall,
    Task,
    held_out,
    make_task,
)
from biohama.tasks.base import describe, draw
from tests.task_streams import PLAIN, facts_of, items_of, question, rows

ALONE = [1, 3, 7, 11, 20]  # single items that are held out, from a = 0 on
FOUR = ("copy", "reverse", "sort", "recall")
LENGTHS = {"train": (3, 10), "id": (3, 10), "ood": (11, 20), "hard": (21, 40), "extreme": (91, 100)}
PAIRS = {"train": (2, 6), "id": (2, 6), "ood": (7, 12), "hard": (13, 24), "extreme": (51, 60)}
DELAYS = {"train": (2, 10), "id": (2, 10), "ood": (11, 20), "hard": (21, 40), "extreme": (91, 100)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FOUR)
def test_streams_are_those_of_plain_python(name, split):
    """From the question alone, Python writes the whole row: tokens, targets and given."""
    batch = make_task(name).sample(split, 150, seeded())
    assert (batch.tokens.dtype, batch.targets.dtype, batch.given.dtype) == (torch.int64, torch.int64, torch.bool)
    width = batch.tokens.shape[1]
    lengths = set()
    for tokens, targets, given in rows(batch):
        expected = PLAIN[name](tokens)
        lengths.add(len(expected[0]))
        for got, want, padding in zip((tokens, targets, given), expected, (PAD, IGNORE, True), strict=True):
            assert got == want + [padding] * (width - len(want))
    assert len(lengths) > 3, "lengths are mixed in a batch"
    assert max(lengths) == width, "and no wider than the longest"


@pytest.mark.parametrize(
    ("name", "tokens", "targets"),
    [
        ("copy", "COPY b a b SEP b a b", "- - - - b a b EOS"),
        ("reverse", "REVERSE b a c SEP c a b", "- - - - c a b EOS"),
        ("sort", "SORT b a b SEP a b b", "- - - - a b b EOS"),
        ("recall", "RECALL k3 b k1 a ~2 ~4 SEP k1 a k3 b", "- - - - - - - - a - b -"),
    ],
)
def test_the_examples_of_the_docstrings(name, tokens, targets):
    names = describe(range(VOCAB_SIZE))
    expected = PLAIN[name]([names.index(token) for token in tokens.split()])
    assert " ".join(describe(expected[0])) == tokens
    assert " ".join("-" if t == IGNORE else names[t] for t in expected[1]) == targets
    drawing = [line.split() for line in TASKS[name].__doc__.splitlines()]
    assert ["tokens", *tokens.split()] in drawing
    assert ["targets", *targets.replace("-", ".").split()] in drawing
    assert ["given", *(str(int(g)) for g in expected[2])] in drawing


@pytest.mark.parametrize("split", SPLITS)
def test_lengths_of_the_splits(split):
    """Every length of the range occurs, and no other."""
    for name in ("copy", "reverse", "sort"):
        batch = make_task(name).sample(split, 1000, seeded())
        low, high = LENGTHS[split]
        assert {int(n) - 1 for n in batch.scored().sum(1)} == set(range(low, high + 1))  # EOS is scored too
    batch = Recall().sample(split, 1000, seeded())
    pairs = batch.scored().sum(1)
    delay = (batch.tokens == SEP).long().argmax(1) - 2 * pairs - 1
    for found, (low, high) in ((pairs, PAIRS[split]), (delay, DELAYS[split])):
        assert set(found.tolist()) == set(range(low, high + 1))


@pytest.mark.parametrize("name", [*FOUR, "mqar"])
def test_splits_share_no_question(name):
    task, (generator, n) = make_task(name), (seeded(), 10_000)
    train = {question(name, row) for row in task.sample("train", n, generator).tokens.tolist()}
    again = {question(name, row) for row in task.sample("train", n, generator).tokens.tolist()}
    for split in task.splits[1:]:
        count = n if split == "id" else 200
        assert not train & {question(name, row) for row in task.sample(split, count, generator).tokens.tolist()}
    assert (name == "mqar") == (not train & again), "short questions come again: without the rule they would collide"


def side(question):
    """The rule in Python's integers, which never wrap."""
    h = sum(x * pow(1_103_515_245, i + 1, 2**31 - 1) for i, x in enumerate(question)) % (2**31 - 1)
    for shift in (15, 13):
        h = (h ^ (h >> shift)) * 1_664_525 % (2**31 - 1)
    return (h >> 4) % 10 == 0


def test_the_rule_of_the_splits():
    """The same side on every machine; padding counts for nothing; a tenth is held out; every item counts."""
    large = torch.randint(0, 2**62, (500, 40), generator=seeded())
    assert held_out(large).tolist() == [side(row) for row in large.tolist()]
    assert held_out(torch.arange(11, 37)[:, None]).nonzero().squeeze(1).tolist() == ALONE
    every = torch.cartesian_prod(*[torch.arange(11, 37)] * 3)
    assert 0.095 < held_out(every).double().mean() < 0.105, "of the shortest questions too"
    assert held_out(torch.cat([every, torch.zeros_like(every)], 1)).equal(held_out(every))
    items = torch.randint(11, 37, (20_000, 8), generator=seeded())
    for position in range(8):
        changed = items.clone()
        changed[:, position] = (changed[:, position] - 11 + 1) % 26 + 11
        assert 0.15 < (held_out(changed) != held_out(items)).double().mean() < 0.21  # 2 * 0.1 * 0.9 if independent


def test_a_pair_told_in_another_order_is_the_same_question():
    batch = Recall().sample("id", 500, seeded())
    for row in batch.tokens.tolist():
        told = sorted(facts_of(row), reverse=True)
        code = torch.tensor([[key * VOCAB_SIZE + value for key, value in told]])
        assert held_out(code).item()


def test_duplicates_are_kept():
    """Items are drawn with replacement: for n = 10 of 26, a sequence without any duplicate has a chance of 0.14."""
    for name in ("copy", "reverse", "sort"):
        batch = make_task(name).sample("hard", 200, seeded())
        most = [max(Counter(items_of(row)).values()) for row in batch.tokens.tolist()]
        assert min(most) >= 2
        assert max(most) >= 5
    assert any(len({v for _, v in facts_of(r)}) < len(facts_of(r)) for r in Recall().sample("id", 99, seeded()).tokens)


def test_every_symbol_is_used_and_no_other():
    seen = {name: set(make_task(name).sample("train", 3000, seeded()).tokens.unique().tolist()) for name in FOUR}
    for name, token in zip(FOUR, range(1, 5), strict=True):
        own = {*KEYS, *NOISE} if name == "recall" else set()
        assert seen[name] == {PAD, token, SEP, *ITEMS, *own}
        assert EOS not in seen[name], "EOS is only ever predicted"


@pytest.mark.parametrize("name", [*FOUR, "mqar", "mixture"])
def test_draws_repeat(name):
    task, everywhere = make_task(name), torch.random.get_rng_state()
    first, generator = task.sample("train", 40, seeded(3)), seeded(3)
    second, third = task.sample("train", 40, generator), task.sample("train", 40, generator)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert not second.tokens[:, :8].equal(third.tokens[:, :8])
    generator.set_state(seeded(3).get_state())
    assert task.sample("train", 40, generator).tokens.equal(first.tokens)
    assert torch.random.get_rng_state().equal(everywhere), "only the generator that was given is used"
    assert len(task.sample("id", 1, seeded()).tokens) == 1


def test_batch():
    batch = Copy().sample("train", 4, seeded())
    there = batch.to("meta")
    assert {tensor.device.type for tensor in there} == {"meta"}
    assert batch.scored().equal(batch.targets != -100)
    assert batch.given[:, 0].all()


def test_names_of_symbols():
    assert describe([0, 1, 4, 5, 6, 7, 11, 36, 37, 100]) == [
        "pad",
        "COPY",
        "RECALL",
        "SEP",
        "EOS",
        *("~1", "a", "z", "k1", "k64"),
    ]
    assert len(set(describe(torch.arange(VOCAB_SIZE)))) == VOCAB_SIZE
    for wrong in ([101], [-1], [1.5], torch.tensor(3), torch.zeros(2, 2).long()):
        with pytest.raises(ValueError, match="tokens must be"):
            describe(wrong)


@pytest.mark.parametrize("name", [*FOUR, "mqar", "mixture"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"split": "test"}, ValueError, "split must be one of train, id, ood, hard, extreme, got 'test'"),
        ({"n": 0}, ValueError, "n must be an integer >= 1, got 0"),
        ({"n": 2.0}, ValueError, "n must be an integer >= 1, got 2.0"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator, got int"),
    ],
)
def test_sample_refuses(name, change, error, message):
    with pytest.raises(error, match=message):
        make_task(name).sample(**{"split": "train", "n": 1, "generator": seeded(), **change})


def test_too_few_questions_end():
    """A side that holds next to nothing is an error, not an endless search."""
    with pytest.raises(ValueError, match="too few questions: 3 of 3 on the train side"):
        draw(3, True, lambda m: (torch.zeros(m, 1).long(),))
    with pytest.raises(ValueError, match="too few questions"):
        make_task("mqar", vocab_size=6, lengths={"train": 8, "id": 8}, pairs={"train": (1, 1), "id": (1, 1)}).sample(
            "id", 5, seeded()
        )


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_one(name):
    task = make_task(name)
    assert isinstance(task, Task)
    assert task.name == name
    batch = task.sample("ood", 20, seeded())
    assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < task.vocab_size
    targets = batch.targets[batch.scored()]
    assert 0 < int(targets.min()) <= int(targets.max()) < task.vocab_size
    assert len(task.describe(batch.tokens[0])) == batch.tokens.shape[1]


def test_mixture_rows_are_those_of_its_tasks():
    batch = Mixture(FOUR).sample("ood", 200, seeded())
    for tokens, targets, given in rows(batch):
        expected = PLAIN[FOUR[tokens[0] - 1]](tokens)
        end = len(expected[0])
        assert (tokens[:end], targets[:end], given[:end]) == tuple(expected)
        assert set(tokens[end:]) <= {PAD}
        assert set(targets[end:]) <= {IGNORE}
        assert all(given[end:])
    first = batch.tokens[:, 0].tolist()
    assert any(first[i] > first[i + 1] for i in range(100)), "the tasks are shuffled"


def test_mixture_weights():
    counts = Mixture(FOUR, [1, 2, 0, 1]).sample("train", 4000, seeded()).tokens[:, 0].bincount(minlength=5).tolist()
    assert counts[3] == 0
    for task, share in ((1, 0.25), (2, 0.5), (4, 0.25)):
        assert abs(counts[task] / 4000 - share) < 0.03


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": []}, ValueError, "tasks must hold at least one task"),
        ({"tasks": "copy"}, TypeError, "tasks must be a sequence of tasks or their names, got the str 'copy'"),
        ({"tasks": ["copy", 3]}, TypeError, "tasks must hold tasks or their names, got int"),
        ({"tasks": ["copy", "mqar"]}, ValueError, "share one vocabulary, got vocab_size of copy 101, mqar 256"),
        ({"weights": [1, 1]}, ValueError, "weights must be 4 finite numbers >= 0"),
        ({"weights": [1, 1, -1, 1]}, ValueError, "weights must be 4 finite numbers >= 0"),
        ({"weights": [0, 0, 0, 0]}, ValueError, "not all 0"),
        ({"weights": [1, 1, 1, float("nan")]}, ValueError, "weights must be 4 finite numbers >= 0"),
    ],
)
def test_mixture_refuses(options, error, message):
    with pytest.raises(error, match=message):
        make_task("mixture", **options)
