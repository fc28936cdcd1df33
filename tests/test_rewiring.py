"""A pool whose stored blocks follow its activity: by hand, in a training run, and what is refused."""

import copy

import pytest
import torch

from sprout import hub
from sprout.objective import next_token
from tests.sprout_models import BLOCKS, pattern_of, small, some_tokens, trained_like
from tests.training import start  # noqa: F401, a fixture


def pattern(neurons):
    """One sample in which these neurons are fully active, of a pool of 96."""
    return pattern_of([neurons], [[1.0] * len(neurons)])._replace(n_neurons=96)


def test_blocks_go_where_neurons_are_active_together():
    model = trained_like(BLOCKS)
    strength = model.pool.connection_strength
    optimizer = torch.optim.AdamW(model.parameters())
    next_token(model, some_tokens(2)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dense, moment = strength.to_dense().detach(), optimizer.state[strength.blocks]["exp_avg"].clone()
    stored = strength.cols.view(6, 2)
    absent = next(c for c in range(6) if c not in stored[0].tolist())
    rewiring = model.rewire(pattern([3, 16 * absent + 2]), optimizers=[optimizer])
    assert absent in strength.cols.view(6, 2)[0].tolist()
    kept = (strength.to_dense() != 0).detach()
    assert torch.equal(strength.to_dense()[kept], dense[kept])
    assert not strength.to_dense()[:16, 16 * absent : 16 * absent + 16].any(), "a new block starts at zero"
    moved = optimizer.state[strength.blocks]["exp_avg"]
    assert torch.equal(moved, torch.where(rewiring.fresh[:, None, None], 0, moment[rewiring.source]))
    assert int(rewiring.fresh.sum()) >= 1
    before = strength.cols.clone()
    assert not model.rewire([pattern([3, 16 * absent + 2])]).fresh.any(), "the same patterns want nothing else"
    assert torch.equal(strength.cols, before)


def test_what_is_refused_changes_nothing():
    model = trained_like(BLOCKS)
    before = copy.deepcopy(model.state_dict())
    one = pattern([3, 40])
    crooked = torch.optim.SGD(model.parameters(), lr=0.1)
    crooked.state[model.pool.connection_strength.blocks]["rows"] = torch.zeros(3)
    for how, message in (
        ((one._replace(n_neurons=95),), "pattern must be over n_neurons=96 neurons, got 95"),
        (([],), "pattern must hold at least one ActivationPattern"),
    ):
        with pytest.raises(ValueError, match=message):
            model.rewire(*how)
    with pytest.raises(ValueError, match="optimizer state 'rows' must have the parameter's shape"):
        model.rewire(one, optimizers=[crooked])
    with pytest.raises(ValueError, match="max_new_per_row"):
        model.rewire(one, max_new_per_row=-1)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match="connection must be 'block_sparse' to be rewired, got 'dense'"):
        small().rewire(one)


def test_a_training_run_rewires(tmp_path, start):  # noqa: F811
    blocks = ["--connection", "block_sparse", "--block_size", "16", "--blocks_per_row", "2", "--max_steps", "3"]
    assert start("still", *blocks) == 0
    assert start("rewired", *blocks, "--rewire_every", "2") == 0
    assert start("groups", *blocks, "--rewire_every", "2", "--active_groups", "2") == 0
    cols = [hub.load(tmp_path / name)[0].pool.connection_strength.cols for name in ("still", "rewired")]
    assert not torch.equal(*cols)


def test_a_dense_run_cannot_be_rewired(tmp_path, start, capsys):  # noqa: F811
    assert start("run", "--rewire_every", "2") == 2
    assert "--rewire_every needs --model sprout --connection block_sparse" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
