"""Free running and teacher forcing, and the measures that are taken of them."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from biohama.baselines import Baseline, BaselineConfig
from biohama.generation import evaluating, free_run, teacher_forced
from biohama.metrics import perplexity, perplexity_meter, seq_acc, seq_right, token_acc
from biohama.tasks import EOS, IGNORE, Batch, make_task


class Successor(nn.Module):
    """Predicts the sum of all tokens so far, modulo 50; its state is that sum. Records what it is fed."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Dropout(), nn.Dropout())
        self.fed = []

    def forward(self, tokens):
        assert not self.inside[0].training
        assert not torch.is_grad_enabled()
        return F.one_hot(tokens.cumsum(1) % 50, 50).float()

    def start(self, batch_size):
        return (torch.zeros(batch_size, dtype=torch.int64),)

    def step(self, tokens, state):
        assert not self.inside[0].training
        assert not torch.is_grad_enabled()
        self.fed.append(tokens)
        return F.one_hot((state[0] + tokens) % 50, 50).float(), (state[0] + tokens,)


def batch_of(tokens, targets, given):
    return Batch(torch.tensor(tokens), torch.tensor(targets), torch.tensor(given, dtype=torch.bool))


def test_the_models_answers_are_its_next_inputs():
    model = Successor()
    batch = batch_of([[3, 4, 9, 9, 5], [1, 1, 1, 9, 9]], [[0] * 5] * 2, [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0]])
    assert free_run(model, batch).tolist() == [[3, 7, 14, 28, 33], [1, 2, 3, 6, 12]]
    assert torch.stack(model.fed, 1).tolist() == [[3, 4, 7, 14, 5], [1, 1, 1, 3, 6]]
    assert teacher_forced(model, batch).tolist() == [[3, 7, 16, 25, 30], [1, 2, 3, 12, 21]]
    assert batch.tokens.tolist() == [[3, 4, 9, 9, 5], [1, 1, 1, 9, 9]], "the batch stays as it was"


def test_modes_come_back():
    model = Successor()
    model.inside[1].eval()
    batch = batch_of([[1, 2]], [[0, 0]], [[1, 1]])
    for predict in (free_run, teacher_forced):
        predict(model, batch)
        assert [part.training for part in model.modules()] == [True, True, True, False]
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training
    assert torch.is_grad_enabled()


def test_the_first_token_must_be_given():
    with pytest.raises(ValueError, match=r"batch\.given must be True at position 0"):
        free_run(Successor(), batch_of([[1, 2]], [[0, 0]], [[0, 1]]))


@pytest.mark.parametrize("name", ["copy", "recall"])
def test_seq_acc_is_the_same_free_and_forced(name):
    """A model that has learnt some sequences by heart: the same ones are right, though the wrong ones differ."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, task = Baseline(BaselineConfig("gru", width=64)), make_task(name)
    known, unknown = (task.sample("train", 12, generator) for _ in range(2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(known.tokens).flatten(0, 1), known.targets.flatten()).backward()
        optimizer.step()
    assert seq_acc(free_run(model, known), known) == 1
    free, forced = (seq_right(predict(model, unknown), unknown) for predict in (free_run, teacher_forced))
    assert free.equal(forced)
    assert not free.all()


def test_eos_counts():
    batch = make_task("sort").sample("id", 8, torch.Generator().manual_seed(0))
    right = batch.targets.clamp(min=0)
    assert seq_acc(right, batch) == token_acc(right, batch) == 1
    wrong = right.masked_fill(right == EOS, 11)
    assert seq_acc(wrong, batch) == 0
    assert token_acc(wrong, batch) == 1 - 8 / int(batch.scored().sum())


def test_only_scored_positions_count():
    targets = [[IGNORE, 4, 5], [IGNORE, IGNORE, 6], [7, 8, 9]]
    batch = batch_of([[1] * 3] * 3, targets, [[1] * 3] * 3)
    pred = torch.tensor([[0, 4, 5], [0, 0, 6], [7, 0, 9]])
    assert seq_right(pred, batch).tolist() == [True, True, False]
    assert seq_acc(pred, batch) == pytest.approx(2 / 3)
    assert token_acc(pred, batch) == pytest.approx(5 / 6)


def test_metrics_refuse():
    batch = batch_of([[1, 2], [3, 4]], [[IGNORE, 4], [IGNORE, IGNORE]], [[1, 1]] * 2)
    with pytest.raises(ValueError, match="at least one position of every sequence"):
        seq_acc(batch.tokens, batch)
    for measure in (seq_acc, token_acc):
        with pytest.raises(ValueError, match=r"pred must be \(2, 2\) as batch.targets, got \(2, 1\)"):
            measure(batch.tokens[:, :1], batch)
    nothing = Batch(batch.tokens, torch.full((2, 2), IGNORE), batch.given)
    with pytest.raises(ValueError, match="at least one position, all are IGNORE"):
        token_acc(batch.tokens, nothing)
    with pytest.raises(ValueError, match="at least one position, all are IGNORE"):
        perplexity(torch.zeros(2, 2, 9), nothing)
    with pytest.raises(ValueError, match=r"logits must be \(2, 2, V\) with batch.targets of \(2, 2\), got \(2, 2\)"):
        perplexity(torch.zeros(2, 2), batch)


def test_perplexity():
    pytest.importorskip("torchmetrics")
    batches = [make_task("recall").sample("id", n, torch.Generator().manual_seed(n)) for n in (4, 9)]
    logits = [torch.randn(*b.tokens.shape, 101, generator=torch.Generator().manual_seed(0)) for b in batches]
    nll = [F.cross_entropy(x.flatten(0, 1), b.targets.flatten()).item() for x, b in zip(logits, batches, strict=True)]
    assert perplexity(logits[0], batches[0]) == pytest.approx(torch.tensor(nll[0]).exp().item(), rel=1e-5)
    meter = perplexity_meter()
    for x, batch in zip(logits, batches, strict=True):
        meter.update(x, batch.targets)
    counts = [int(batch.scored().sum()) for batch in batches]
    mean = sum(n * count for n, count in zip(nll, counts, strict=True)) / sum(counts)
    assert meter.compute().item() == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-5)
    uniform = torch.zeros(*batches[0].tokens.shape, 101)
    assert perplexity(uniform, batches[0]) == pytest.approx(101, rel=1e-5)


def test_perplexity_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.text", None)
    with pytest.raises(ImportError, match=r"bio-kernels\[experiments\]"):
        perplexity_meter()
