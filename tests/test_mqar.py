"""MQAR's properties, and tasks that are made by name: ours, a user's, and what is refused."""

from __future__ import annotations

import pytest
import torch

from biohama.tasks import IGNORE, MQAR, SPLITS, Task, make_task

SHAPES = {"train": (64, 4, 8), "id": (64, 4, 8), "ood": (128, 16, 16), "hard": (256, 32, 32), "extreme": (640, 64, 64)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_come_first_and_each_key_is_asked_for_once(split):
    """The number of pairs is read off the targets; everything else follows from the tokens."""
    length, low, high = SHAPES[split]
    batch = MQAR().sample(split, 300, seeded())
    assert batch.tokens.shape == (300, length)
    assert batch.given.all(), "nothing of the stream is the model's own"
    counts = set()
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        asked = [t for t, target in enumerate(targets) if target != IGNORE]
        n = len(asked)
        facts = dict(zip(tokens[: 2 * n : 2], tokens[1 : 2 * n : 2], strict=True))
        assert len(facts) == n, "keys are distinct"
        assert all(1 <= key <= 127 < value <= 255 for key, value in facts.items())
        assert {tokens[t]: targets[t] for t in asked} == facts
        assert all(t >= 2 * n and t % 2 == 0 for t in asked)
        assert not set(facts) & {tokens[t] for t in range(2 * n, length) if t not in asked}, "fillers are no keys"
        counts.add(n)
    assert counts == set(range(low, high + 1))


def test_distances_follow_the_power_law():
    """One pair: the place of its query has probability ~ i^(a - 1), here over 30 places."""
    for a in (0.01, 0.5, 1.0):
        task = MQAR(lengths={"train": 62}, pairs={"train": (1, 1)}, power_a=a)
        place = task.sample("train", 30_000, seeded()).scored().long().argmax(1) // 2
        found = place.bincount(minlength=31)[1:].double() / 30_000
        law = torch.arange(1, 31).double() ** (a - 1)
        assert (found - law / law.sum()).abs().max() < 0.012
        assert (a < 1) == (found[0] > 1.5 * found[29])


def test_fillers_are_all_symbols_but_the_keys():
    task = MQAR(vocab_size=32, lengths={"train": 40}, pairs={"train": (1, 3)})
    batch = task.sample("train", 3000, seeded())
    last = batch.tokens[:, -1]  # 40 is even: no query can stand there
    assert set(last.tolist()) == set(range(1, 32))
    assert last.bincount(minlength=32)[1:].min() > 50
    assert task.describe([0, 1, 15, 16, 31]) == ["pad", "k1", "k15", "v1", "v16"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 3}, "vocab_size must be an integer >= 4, got 3"),
        ({"vocab_size": 256.0}, "vocab_size must be an integer >= 4, got 256.0"),
        ({"power_a": 0}, "power_a must be a finite number > 0, got 0"),
        ({"power_a": float("nan")}, "power_a must be a finite number > 0, got nan"),
        ({"lengths": {"train": 64}}, "lengths and pairs must have the same splits"),
        ({"lengths": {"id": 64}, "pairs": {"id": (1, 2)}}, '"train" among them'),
        ({"lengths": {"train": 3}, "pairs": {"train": (1, 1)}}, r"lengths\['train'\] must be an integer >= 4, got 3"),
        ({"lengths": {"train": 64}, "pairs": {"train": (1, 17)}}, r"pairs\['train'\] must be .* in 1..16"),
        ({"lengths": {"train": 64}, "pairs": {"train": (3, 2)}}, r"got \(3, 2\)"),
        ({"vocab_size": 21, "lengths": {"train": 99}, "pairs": {"train": (1, 11)}}, "in 1..10, at most the 10 keys"),
        ({"vocab_size": 128}, r"pairs\['extreme'\] must be .* in 1..63"),
    ],
)
def test_mqar_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("mqar", **options)


def test_as_tight_as_it_gets():
    """A quarter of the length in pairs, as many as there are keys: every second place is a query."""
    task = MQAR(vocab_size=17, lengths={"train": 32}, pairs={"train": (8, 8)})
    assert (task.sample("train", 50, seeded()).scored()[:, 16::2]).all()


USERS = """
import torch
from biohama.tasks import Batch

class Echo:
    name, vocab_size, splits = "echo", 8, ("train", "id")
    def __init__(self, shift=0):
        self.shift = shift
    def sample(self, split, n, generator):
        tokens = torch.randint(1, 8, (n, 4), generator=generator)
        return Batch(tokens, tokens + self.shift, tokens > 0)
    def describe(self, tokens):
        return [str(int(token)) for token in tokens]

class NoTask:
    name = "none"

number = 3
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "users_tasks.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("users_module")
def test_a_users_task():
    task = make_task("users_tasks:Echo", shift=1)
    assert isinstance(task, Task)
    batch = task.sample("train", 5, seeded())
    assert batch.targets.equal(batch.tokens + 1)
    mixed = make_task("mixture", tasks=["users_tasks:Echo", task])
    assert mixed.splits == ("train", "id")
    assert mixed.sample("id", 30, seeded()).tokens.shape == (30, 4)


@pytest.mark.usefixtures("users_module")
@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("copi", {}, ValueError, "name must be one of copy, reverse, .* or \"module:Class\", got 'copi'"),
        (3, {}, TypeError, "name must be a str, got int"),
        ("copy", {"size": 3}, TypeError, "options of 'copy': .*'size'; it takes no options"),
        ("mqar", {"vocab": 3}, TypeError, "it takes vocab_size, lengths, pairs, power_a"),
        ("users_tasks:Echo", {"delay": 3}, TypeError, "'delay'; it takes shift"),
        ("users_tasks:NoTask", {}, TypeError, "is not a task: it lacks describe, sample, splits, vocab_size"),
        ("users_tasks:Ecco", {}, ValueError, "has no class 'Ecco'"),
        ("users_tasks:number", {}, ValueError, "has no class 'number'"),
        ("users_tasks:", {}, ValueError, "has no class ''"),
        (":Echo", {}, ValueError, "name must be \"module:Class\", got ':Echo'"),
        ("users_taskz:Echo", {}, ValueError, "the module 'users_taskz' cannot be imported"),
    ],
)
def test_make_task_refuses(name, options, error, message):
    with pytest.raises(error, match=message):
        make_task(name, **options)
