"""Pruning a pool: who is silent, outputs that stay, block rows of different lengths, saving what was resized."""

import pytest
import torch

import sprout
from sprout import BrainLikeSprout, silent_neurons
from tests.sprout_models import BLOCKS, pattern_of, some_tokens, trained_like

KINDS = pytest.mark.parametrize("kind", [{}, BLOCKS], ids=["dense", "block_sparse"])


def test_silent_neurons():
    one = pattern_of([[1, 3], [3]], [[0.5, 0.5], [1.0]])
    two = pattern_of([[7, 8], []], [[0.5, 0.5], []])
    assert silent_neurons(one).nonzero().flatten().tolist() == [0, 2, 4, 5, 6, 7, 8, 9]
    assert silent_neurons([one, two]).nonzero().flatten().tolist() == [0, 2, 4, 5, 6, 9]
    assert silent_neurons([one, two], group_size=2).nonzero().flatten().tolist() == [4, 5]
    for wrong, size, message in (
        ([], 1, r"over one pool, got n_neurons of \[\]"),
        ([one, two._replace(n_neurons=11)], 1, r"over one pool, got n_neurons of \[10, 11\]"),
        (one, 3, "group_size must divide n_neurons=10, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            silent_neurons(wrong, size)


@KINDS
def test_pruning_silent_neurons_changes_nothing_they_were_silent_for(kind):
    model, tokens = trained_like(kind).double(), some_tokens(2)
    group = kind.get("block_size", 1)
    if group > 1:  # two groups that sleep
        with torch.no_grad():
            model.pool.threshold[16:32] -= 50
            model.pool.threshold[80:] -= 50
    history = model.settle(tokens).history
    silent = silent_neurons(history, group)
    before, numbers = model(tokens), (~silent).nonzero().flatten()
    strength = model.pool.connection_strength
    dense = strength.to_dense() if group > 1 else strength.detach().clone()
    assert 20 < int(silent.sum()) < 90
    model.prune(silent)
    assert model.config.n_neurons == len(numbers)
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-12)
    for old, new in zip(history, model.settle(tokens).history, strict=True):
        assert torch.equal(numbers[new.idx[new.valid()]], old.idx[old.valid()])
    after = model.pool.connection_strength
    assert torch.equal(after.to_dense() if group > 1 else after, dense[numbers][:, numbers])
    control = trained_like(kind).double()
    control.prune(~silent)
    assert not torch.allclose(control(tokens), before), "the others matter"


@KINDS
def test_optimizers_keep_the_rows_that_stay(kind):
    """An optimizer whose state is the parameter itself, so that both must be cut alike."""
    model = trained_like(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = p.detach().clone()
    model.prune(torch.arange(16, 48), optimizers=[optimizer])
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], p) for p in model.parameters())


@KINDS
def test_a_mask_and_numbers_mean_the_same(kind):
    first, second = trained_like(kind), trained_like(kind)
    numbers = torch.arange(32, 48)
    mask = torch.zeros(96, dtype=torch.bool)
    mask[numbers] = True
    first.prune(mask)
    second.prune(torch.cat([numbers.flip(0), numbers]).int())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    first.prune(numbers[:0])
    assert first.config == second.config


def test_the_library_takes_block_rows_of_different_lengths():
    """A pruned block-sparse pool: forward and gradients as its dense twin, plasticity, and it grows again."""
    model = trained_like({**BLOCKS, "blocks_per_row": 3}).double()
    model.prune(torch.arange(16, 64))
    lengths = model.pool.connection_strength.row_offsets.diff()
    assert lengths.unique().numel() > 1
    assert model.config.blocks_per_row == 3
    dense = trained_like(BLOCKS, n_neurons=48).double()
    dense.load_state_dict(model.state_dict())
    for module in (dense, dense.encoder, dense.interaction, dense.decoder):
        module.config = sprout.SproutConfig(**{**vars(model.config), "backend": "dense"})
    for m in (model, dense):
        history = m.settle(some_tokens()).history
        m(some_tokens()).logsumexp(1).sum().backward()
        m.plasticity(history, eta=0.1, decay=1.0)
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10, msg=lambda m: f"{name}: {m}")  # noqa: B023
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
    before = model(some_tokens())
    model.grow(16)
    assert torch.equal(model(some_tokens()), before)
    assert model.pool.connection_strength.row_offsets.diff().tolist() == [*lengths.tolist(), 3]


def test_few_groups_left_store_fewer_blocks_in_a_row():
    model = trained_like({**BLOCKS, "blocks_per_row": 6})
    model.prune(torch.arange(32))
    assert (model.config.n_neurons, model.config.blocks_per_row) == (64, 4)


@KINDS
@pytest.mark.parametrize("change", ["grown", "pruned"])
def test_a_resized_model_is_saved_and_comes_back(kind, change, tmp_path):
    pytest.importorskip("safetensors")
    model = trained_like(kind)
    model.grow(32) if change == "grown" else model.prune(torch.arange(16, 64))
    model.save_pretrained(tmp_path)
    again = BrainLikeSprout.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(some_tokens()), model.eval()(some_tokens()))
