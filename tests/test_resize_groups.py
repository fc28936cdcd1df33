"""A pool in groups that grows and is pruned: whole groups sleep, wake and go."""

import pytest
import torch

from sprout import BrainLikeSprout, silent_neurons
from sprout.objective import next_token
from tests.sprout_models import BLOCKS, some_tokens, trained_like

GROUPS = {**BLOCKS, "active_groups": 3}


def model_of():
    model = trained_like(GROUPS)
    with torch.no_grad():
        model.pool.group_threshold.normal_(0.0, 0.5)
    return model


@pytest.mark.parametrize("n", [16, 320])
def test_growing_changes_no_bit_of_an_output(n):
    model, tokens = model_of(), some_tokens(8)
    before, history = model(tokens), model.settle(tokens).history
    model.grow(n)
    assert torch.equal(model(tokens), before)
    assert all(torch.equal(a.idx, b.idx) for a, b in zip(model.settle(tokens).history, history, strict=True))
    assert model.pool.group_signatures.shape == (6 + n // 16, 16)
    assert model.pool.group_threshold.shape == (6 + n // 16,)
    with torch.no_grad():
        model.pool.group_threshold[6:] += 100
        assert not torch.equal(model(tokens), before), "a group that is awake would be noticed"


def test_no_input_chooses_a_grown_group():
    model = model_of()
    model.grow(64, generator=torch.Generator().manual_seed(0))
    norm, signatures = model.encoder.norm, model.pool.group_signatures.detach()
    towards = signatures * norm.weight
    z = norm(torch.cat([towards, -towards, torch.randn(500, 16)])).detach()
    score = model.pool.group_score(z).detach()
    assert bool((score[:, 6:].amax(1) < score[:, :6].topk(3, dim=1).values[:, -1]).all())
    assert score[:, 6:].max() > -40, "yet not further down than need be"


def test_waken_raises_silent_groups_and_the_silent_neurons_of_the_others():
    model = model_of()
    silent = torch.zeros(96, dtype=torch.bool)
    silent[:16], silent[20] = True, True
    threshold, group = model.pool.threshold.detach().clone(), model.pool.group_threshold.detach().clone()
    model.pool.waken(silent, rate=0.25)
    changed = (model.pool.threshold - threshold).nonzero().flatten().tolist()
    assert changed == [20]
    torch.testing.assert_close(model.pool.group_threshold - group, torch.tensor([0.25, 0, 0, 0, 0, 0]))


def test_grown_groups_wake_up_in_training():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model.grow(32, optimizers=[optimizer])
    used = torch.zeros(128, dtype=torch.bool)
    for step in range(30):
        o = next_token(model, some_tokens(2, 9, seed=step))
        model.zero_grad()
        o.loss.backward()
        optimizer.step()
        model.pool.waken(silent_neurons(o.history), rate=0.5)
        assert torch.isfinite(o.loss)
        used |= ~silent_neurons(o.history)
    assert bool(used[96:112].any())
    assert bool(used[112:].any())


def test_pruning_groups_that_nobody_chose_changes_nothing(tmp_path):
    model, tokens = model_of().double(), some_tokens(2)
    with torch.no_grad():
        model.pool.group_threshold[[1, 5]] -= 50
    before = model(tokens)
    silent = silent_neurons(model.settle(tokens).history, 16)
    assert silent.view(6, 16)[[1, 5]].all()
    model.prune(torch.cat([torch.arange(16, 32), torch.arange(80, 96)]))
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-12)
    assert model.pool.group_signatures.shape == (4, 16)
    model.save_pretrained(tmp_path)
    again = BrainLikeSprout.from_pretrained(tmp_path).double()
    torch.testing.assert_close(again(tokens), before, rtol=0, atol=1e-5)


def test_too_few_groups_are_refused_and_nothing_changes():
    model = model_of()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match="active_groups must be 0 or an integer"):
        model.prune(torch.arange(64))
    assert model.config.n_neurons == 96
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
