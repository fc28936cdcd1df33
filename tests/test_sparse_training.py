"""Training a pool in groups: sparse gradients are clipped, and move only the rows that they hold."""
# ruff: noqa: F401, F811 -- the fixture start

import math

import pytest
import torch

from sprout import hub
from sprout.objective import next_token
from sprout.sparse_gradients import clip_grad_norm_, sparse_tables
from sprout.train_config import TrainConfig
from sprout.trainer import make_optimizers
from tests.sprout_models import small, some_tokens, wired
from tests.test_train import GROUPS
from tests.training import start

TABLES = {"pool.neuron_signatures", "pool.threshold", "pool.connection_strength.blocks", "decoder.readout"}


def grouped(**changes):
    sizes = dict(n_neurons=1024, connection="block_sparse", block_size=16, blocks_per_row=2, active_groups=3)
    return wired(small(**{**sizes, **changes}))


def learn(model, steps=1, balance=0.0):
    for step in range(steps):
        next_token(model, some_tokens(2, 5, seed=step), balance=balance, settling=0.1).loss.backward()
    return model


def test_which_tables_are_sparse():
    assert sparse_tables(grouped()) == TABLES
    assert sparse_tables(grouped(active_groups=0)) == set()
    config = grouped().config
    assert sparse_tables(hub.make_model("gpt", config)) == sparse_tables(hub.make_model("encoder", config)) == set()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizers_share_the_parameters_out(optimizer):
    model = grouped()
    *others, sparse = make_optimizers(model, TrainConfig(optimizer=optimizer, lr=0.5, beta2=0.9))
    assert isinstance(sparse, torch.optim.SparseAdam)
    assert sparse.defaults["betas"] == (0.9, 0.9)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = [{names[id(p)] for g in o.param_groups for p in g["params"]} for o in (*others, sparse)]
    assert taken[-1] == TABLES
    assert set().union(*taken) == set(names.values())
    assert sum(map(len, taken)) == len(names)
    (still,) = (g["params"] for g in others[0].param_groups if not g["weight_decay"])
    assert {"pool.group_signatures", "pool.group_threshold"} <= {names[id(p)] for p in still}
    assert {g["highest_lr"] for g in sparse.param_groups} == {0.5}


@pytest.mark.parametrize("limit", [0.01, 1e6, math.inf])
@pytest.mark.parametrize("repeats", [False, True])
def test_clipping_is_that_of_dense_gradients(limit, repeats):
    model = learn(grouped(), steps=2)
    if repeats:  # as torch may leave it after several batches: rows appended, not summed
        grad = model.decoder.readout.grad
        where, values = torch.cat([grad.indices()] * 2, 1), torch.cat([grad.values()] * 2)
        model.decoder.readout.grad = torch.sparse_coo_tensor(where, values, grad.shape, check_invariants=True)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for twin, p in zip(copies, model.parameters(), strict=True):
        twin.grad = p.grad.to_dense().clone()
    norm = clip_grad_norm_(model.parameters(), limit)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(copies, limit))
    for twin, p in zip(copies, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad.to_dense(), twin.grad)


def test_only_touched_rows_move_and_the_first_step_is_adams():
    model = learn(grouped(), balance=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    twin = {name: torch.nn.Parameter(before[name].clone()) for name in TABLES}
    for name, p in twin.items():
        p.grad = model.get_parameter(name).grad.to_dense().clone()
    torch.optim.Adam(list(twin.values()), lr=1e-3, betas=(0.9, 0.99)).step()
    optimizers = make_optimizers(model, TrainConfig())
    for optimizer in optimizers:
        optimizer.step()
    for name in TABLES:
        p = model.get_parameter(name)
        clear = twin[name].grad.abs() > 1e-5  # of smaller ones its epsilon, which SparseAdam adds elsewhere, decides
        torch.testing.assert_close(p[clear], twin[name][clear])
        still = torch.ones(len(p), dtype=torch.bool)
        still[p.grad.indices()[0]] = False
        assert 0.2 < still.double().mean() < 1, name
        assert torch.equal(p[still], before[name][still]), name
        assert not torch.equal(p[~still], before[name][~still]), name
        assert not optimizers[-1].state[p]["exp_avg_sq"][still].any()


def test_parameters_learn():
    model, tokens = grouped(), some_tokens(8)
    optimizers = make_optimizers(model, TrainConfig(lr=1e-2))
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(tokens), tokens[:, 0])
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_a_table_that_is_not_finite_is_not_saved(tmp_path, start, capsys, monkeypatch):
    """The line of metrics does not look at the tables; the checkpoint does."""
    from sprout.trainer import Trainer

    step = Trainer.train_step

    def spoil(self):
        facts = step(self)
        if self.step == 6:
            self.model.pool.neuron_signatures.data[0] = math.nan
        return facts

    monkeypatch.setattr(Trainer, "train_step", spoil)
    monkeypatch.setattr("sprout.paging.choose_groups", lambda score, _: torch.tensor([[1, 2]] * len(score)))
    assert start("run", *GROUPS) == 1
    assert "the loss or a weight is not finite at step 8" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
