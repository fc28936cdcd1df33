"""A SPROUT on a block-sparse matrix trains as one on the dense matrix of the same blocks, and on through a rewiring."""

import bio_kernels as bk
import pytest
import torch

from sprout.objective import next_token
from tests.sprout_models import small, some_tokens, wired

P = 16
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01),
}


def pair(blocks_per_row):
    """(block-sparse model, dense model with the same values, which of its entries are stored), in float64."""
    size = dict(backend="reference", n_interaction_steps=2)
    sparse = wired(small(connection="block_sparse", block_size=P, blocks_per_row=blocks_per_row, **size)).double()
    dense = small(**size).double()
    strength = sparse.pool.connection_strength
    state = {k: v for k, v in sparse.state_dict().items() if not k.startswith("pool.connection_strength")}
    dense.load_state_dict({**state, "pool.connection_strength": strength.to_dense()})
    ones = bk.BlockSparse(torch.ones_like(strength.blocks), strength.row_offsets, strength.cols)
    return sparse, dense, ones.to_dense().bool()


def named_gradients(model):
    """By name, the matrix as a dense one."""
    found = {name: p.grad for name, p in model.named_parameters()}
    strength = model.pool.connection_strength
    if isinstance(strength, bk.BlockSparse):
        blocks = found.pop("pool.connection_strength.blocks")
        found["pool.connection_strength"] = bk.BlockSparse(blocks, strength.row_offsets, strength.cols).to_dense()
    return found


def same(a, b, what, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("blocks_per_row", [6, 2])
@pytest.mark.parametrize("all_positions", [False, True])
def test_logits_and_gradients_are_those_of_the_dense_matrix(blocks_per_row, all_positions):
    sparse, dense, stored = pair(blocks_per_row)
    assert bool(stored.all()) == (blocks_per_row == 6)
    logits = [model(some_tokens(), all_positions=all_positions) for model in (sparse, dense)]
    same(*logits, "logits")
    for out in logits:
        out.logsumexp(-1).sum().backward()
    found, expected = named_gradients(sparse), named_gradients(dense)
    assert found.keys() == expected.keys()
    assert expected["pool.connection_strength"][stored].any()
    expected["pool.connection_strength"].masked_fill_(~stored, 0)
    for name, gradient in found.items():
        same(gradient, expected[name], name)


def training(model, optimizer, stored=None, steps=10, first=0):
    """Losses of some steps, each followed by Oja's rule; of a dense matrix all but the stored blocks is erased."""
    losses = []
    for step in range(first, first + steps):
        o = next_token(model, some_tokens(2, 6, seed=step), balance=0.01, settling=0.1)
        optimizer.zero_grad()
        o.loss.backward()
        optimizer.step()
        model.plasticity(o.history, eta=0.05, decay=1.0, bound=0.5)
        if stored is not None:
            model.pool.connection_strength.data.masked_fill_(~stored, 0)
        losses.append(o.loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("blocks_per_row", [6, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_are_those_of_the_dense_matrix(name, blocks_per_row):
    sparse, dense, stored = pair(blocks_per_row)
    start = sparse.pool.connection_strength.blocks.detach().clone()
    found = training(sparse, OPTIMIZERS[name](sparse.parameters()))
    same(found, training(dense, OPTIMIZERS[name](dense.parameters()), stored), "losses", 1e-8)
    assert (found.diff() != 0).all()
    same(sparse.pool.connection_strength.to_dense(), dense.pool.connection_strength, "strength", 1e-8)
    assert (sparse.pool.connection_strength.blocks - start).abs().max() > 1e-3, "something was learnt"
    for key, value in dense.named_parameters():
        if key != "pool.connection_strength":
            same(sparse.get_parameter(key), value, key, 1e-8)


def test_without_the_mask_the_dense_matrix_goes_its_own_way():
    """The control of the test above: blocks that are not stored would matter."""
    sparse, dense, _ = pair(2)
    found = training(sparse, OPTIMIZERS["adamw"](sparse.parameters()), steps=4)
    assert (found - training(dense, OPTIMIZERS["adamw"](dense.parameters()), steps=4)).abs().max() > 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_through_a_rewiring(name):
    """As with the dense matrix, whose dropped blocks, and what its optimizer remembers of them, are erased."""
    sparse, dense, stored = pair(2)
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (sparse, dense)]
    training(sparse, optimizers[0], steps=4)
    training(dense, optimizers[1], stored, steps=4)
    strength, blocks = sparse.pool.connection_strength, sparse.pool.connection_strength.blocks
    with torch.no_grad():
        history = sparse.settle(some_tokens(16)).history
    wanted = [torch.cat(x) for x in zip(*(bk.co_activity(*p[:3], p.n_neurons, P) for p in history), strict=True)]
    rewiring = bk.rewire_(strength, tuple(wanted), max_new_per_row=1)
    bk.rewire_optimizer_(optimizers[0], blocks, rewiring)
    assert 0 < int(rewiring.fresh.sum()) < len(rewiring.fresh)

    kept = (~rewiring.fresh)[:, None, None].expand_as(blocks).double()
    kept = bk.BlockSparse(kept, strength.row_offsets, strength.cols).to_dense().bool()
    before = stored
    stored = bk.BlockSparse(torch.ones_like(blocks), strength.row_offsets, strength.cols).to_dense().bool()
    assert not torch.equal(stored, before)
    matrix = dense.pool.connection_strength
    remembered = [x for x in optimizers[1].state[matrix].values() if torch.is_tensor(x) and x.shape == matrix.shape]
    assert remembered
    for x in (matrix.data, *remembered):
        x.masked_fill_(~kept, 0)
    same(strength.to_dense(), matrix, "strength", 1e-8)
    found = training(sparse, optimizers[0], steps=4, first=4)
    same(found, training(dense, optimizers[1], stored, steps=4, first=4), "losses", 1e-8)
    assert strength.blocks is blocks
    assert strength.blocks[rewiring.fresh].abs().sum((1, 2)).all(), "fresh blocks learn"
