"""The model as its users type it: results, gradients, padding, copies."""

import copy
import pickle

import pytest
import torch

import sprout
from sprout import SproutConfig
from tests.sprout_models import small, some_tokens, wired


def test_the_readme_example():
    model, tokens = small(), some_tokens()
    logits = model(tokens)
    assert logits.shape == (3, 50)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    analysis = model.analyze_activation(tokens)
    assert analysis["initial_active"].tolist() == [12, 12, 12]
    assert analysis["initial_active_mean"] == 12.0
    assert analysis["final_active"].dtype == torch.int64
    assert analysis["final_active_mean"] == pytest.approx(analysis["final_active"].double().mean().item())
    assert len(analysis["activation_history"]) == len(analysis["top_neurons_per_step"]) == 4
    assert analysis["jaccard"].shape == analysis["gate_change"].shape == (3, 3)
    for number, (step, pattern) in enumerate(
        zip(analysis["top_neurons_per_step"], analysis["activation_history"], strict=True)
    ):
        mean = pattern.to_dense().mean(0)
        assert step["step"] == number
        assert pattern.to_dense().shape == (3, 96)
        torch.testing.assert_close(step["values"], mean.sort(descending=True).values[:10])
        torch.testing.assert_close(mean[step["indices"]], step["values"])
        assert not pattern.gate.requires_grad
    assert len(model.analyze_activation(tokens, top_k=500)["top_neurons_per_step"][0]["indices"]) <= 36
    assert sprout.__version__ == "0.1.0"


def test_defaults_are_those_of_the_design():
    config = SproutConfig(vocab_size=30000)
    assert (config.n_neurons, config.d_state, config.n_interaction_steps) == (4096, 256, 5)
    assert (config.initial_sparsity, config.final_sparsity, config.connection) == (128, 256, "dense")


def test_no_interaction_decodes_the_initial_pattern():
    analysis = small(n_interaction_steps=0).analyze_activation(some_tokens())
    assert torch.equal(analysis["initial_active"], analysis["final_active"])
    assert analysis["jaccard"].shape == (0, 3)


@pytest.mark.parametrize("connection", ["dense", "block_sparse"])
def test_every_parameter_has_a_gradient(connection):
    model = small(connection=connection, blocks_per_row=2)
    model(some_tokens(8)).logsumexp(1).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


def test_parameters_learn():
    model, tokens = small(), some_tokens(8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(tokens), tokens[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_the_same_input_gives_the_same_bits():
    grads = []
    for _ in range(2):
        model = wired(small())
        model(some_tokens()).logsumexp(1).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_sparse_gradients_of_the_pool_sum_to_the_dense_ones(monkeypatch):
    model, tokens = wired(small()).double(), some_tokens()
    assert model.pool.wiring(2, 96)[1].sparse_grad
    assert not model.pool.wiring(2, 97)[1].sparse_grad, "more slots than rows: sparse would be larger"

    def gradients():
        model.zero_grad()
        model(tokens).logsumexp(1).sum().backward()
        return [p.grad for p in model.parameters()]

    sparse = gradients()
    assert all(grad.layout == torch.strided for grad in sparse)

    def plain(pool, n_steps, n_slots):
        return [sprout.Wiring(pool.neuron_signatures, pool.connection_strength, pool.connection_strength)] * n_steps

    monkeypatch.setattr(sprout.GlobalNeuronPool, "wiring", plain)
    torch.testing.assert_close(sparse, gradients(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("grad", [True, False])  # without gradient in eval mode torch takes another path in the encoder
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("real", [1, 6])
def test_padding_is_masked(left, real, grad):
    model, tokens = wired(small()).double().eval(), some_tokens(1, real)
    junk = some_tokens(1, 4, seed=3)
    padded = torch.cat([junk, tokens] if left else [tokens, junk], 1)
    mask = torch.tensor([[0] * 4 + [1] * real if left else [1] * real + [0] * 4])
    with torch.set_grad_enabled(grad):
        expected = model(tokens)
        torch.testing.assert_close(model(padded, mask), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(padded, mask.bool()), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(tokens, torch.ones_like(tokens)), expected, rtol=0, atol=1e-10)
        assert not torch.allclose(model(padded), expected)


def test_samples_do_not_see_each_other():
    model, tokens = wired(small()).double(), some_tokens(4)
    torch.testing.assert_close(model(tokens)[2:3], model(tokens[2:3]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("connection", ["dense", "block_sparse"])
def test_copies_compute_the_same(connection):
    model, tokens = wired(small(connection=connection, blocks_per_row=2)), some_tokens()
    loaded = small(seed=5, connection=connection, blocks_per_row=2)
    assert not torch.equal(loaded(tokens), model(tokens))
    loaded.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(twin(tokens), model(tokens))
        assert twin.config == model.config


def test_repr_tells_the_sizes():
    text = repr(small())
    for part in (
        "n_interaction_steps=3",
        "sparsity=12->20 of 96",
        "connection='dense'",
        "recruits_per_step=6",
        "vocab_size=50",
    ):
        assert part in text
