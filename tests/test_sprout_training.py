"""Training: the sparse and the dense way of computing give the same losses, and the dynamics do what they are for."""

import copy

import pytest
import torch

from sprout.model import strongest
from sprout.objective import balance_loss, next_token
from sprout.paging import GroupedScore
from sprout.pattern import ActivationPattern
from tests.sprout_models import small, some_tokens, wired


def losses_of(model, steps, dtype):
    """Losses of some steps of AdamW on random tokens, in prefix mode with both terms, and Hebbian plasticity."""
    model = model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        o = next_token(model, some_tokens(2, 9, seed=step), balance=0.01, settling=0.1)
        optimizer.zero_grad()
        o.loss.backward()
        optimizer.step()
        model.plasticity(o.history, eta=1e-3, decay=1.0)
        losses.append(o.loss.detach().double())
    return torch.stack(losses)


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [(torch.float64, 20, 1e-8), (torch.float32, 3, 1e-4)])
@pytest.mark.parametrize("connection", ["dense", "block_sparse"])
def test_sparse_and_dense_training_agree(connection, dtype, steps, tolerance):
    sparse = small(connection=connection, blocks_per_row=2, backend="reference")
    dense = small(connection=connection, blocks_per_row=2, backend="dense")
    dense.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(losses_of(sparse, steps, dtype), losses_of(dense, steps, dtype), rtol=0, atol=tolerance)
    assert sparse.pool.connection_strength is not dense.pool.connection_strength


def test_a_part_that_differs_is_noticed():
    """The control of the test above: without plasticity the losses drift apart by more than its tolerance."""
    plain, frozen = small(), small()
    frozen.plasticity = lambda *_, **__: None
    difference = losses_of(plain, 20, torch.float64) - losses_of(frozen, 20, torch.float64)
    assert difference.abs().max() > 1e-8


def test_balance_wakes_neurons_that_were_silent():
    """A pool in which most neurons start far below the others: balanced training uses more of them."""
    start = small()
    with torch.no_grad():
        start.pool.threshold[:60] -= 3.0

    def used(balance):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
        for step in range(60):
            o = next_token(model, some_tokens(4, 12, seed=step), balance=balance)
            optimizer.zero_grad()
            o.loss.backward()
            optimizer.step()
        history = model.settle(some_tokens(16, 12, seed=99), all_positions=True).history
        return torch.cat([p.idx[p.valid()] for p in history]).unique().numel()

    assert used(0.1) > used(0.0) + 5


def test_settling_makes_the_last_step_quieter():
    start = wired(small())

    def change(settling):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
        for step in range(30):
            o = next_token(model, some_tokens(4, 12, seed=step), settling=settling)
            optimizer.zero_grad()
            o.loss.backward()
            optimizer.step()
        return next_token(model, some_tokens(8, 12, seed=99)).settling.item()

    assert change(10.0) < 0.8 * change(0.0)


def first_pattern(batch, n, k):
    """The same k neurons in every sample."""
    idx, count = torch.arange(k).expand(batch, -1), torch.full((batch,), k)
    return ActivationPattern(idx, torch.ones(batch, k), count, n)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_collapsed_pool_is_seen_in_16_bit(dtype, groups):
    """bfloat16 counts to 256: of neurons that wake in more samples it would make evenly used ones."""
    batch, n, k = 2500, 64, 16
    score = torch.zeros(batch, n, dtype=dtype)
    score[:, :k] = 3.0
    first = first_pattern(batch, n, k)
    given = GroupedScore(score[:, ::16].contiguous(), torch.arange(4), score) if groups else score
    wide = GroupedScore(*(x.float() if x.is_floating_point() else x for x in given)) if groups else score.float()
    assert balance_loss(given, first).item() == pytest.approx(balance_loss(wide, first).item(), rel=1e-6)
    assert balance_loss(given, first).item() > 3


def test_an_analysis_counts_in_16_bit_too():
    first = first_pattern(2500, 64, 16)
    found = strongest(first._replace(gate=first.gate.bfloat16()), 0, 3)
    assert found["values"].tolist() == [1, 1, 1]
