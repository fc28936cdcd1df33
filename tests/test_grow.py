"""Growing a pool: outputs that stay, optimizers that follow, neurons that wake up; what resizing refuses."""

import copy
import re

import pytest
import torch

from sprout import silent_neurons
from sprout.objective import next_token
from tests.sprout_models import BLOCKS, small, some_tokens, trained_like

KINDS = pytest.mark.parametrize("kind", [{}, BLOCKS], ids=["dense", "block_sparse"])
TABLES = {"pool.neuron_signatures", "pool.threshold", "decoder.readout"}


def some_optimizers(model):
    """AdamW and SGD over all parameters, after a step each."""
    parameters = list(model.parameters())
    optimizers = [
        torch.optim.AdamW(parameters, lr=1e-2),
        torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    ]
    train(model, optimizers, 1)
    return optimizers


def train(model, optimizers, steps, wake=0.0):
    losses = []
    for step in range(steps):
        o = next_token(model, some_tokens(2, 9, seed=step))
        model.zero_grad()
        o.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if wake:
            model.pool.waken(silent_neurons(o.history), rate=wake)
        losses.append(o.loss.item())
    return losses


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [16, 96, 1024])
def test_growing_changes_no_bit_of_an_output(kind, dtype, n):
    model = trained_like(kind).to(dtype)
    tokens = some_tokens(8)
    before, prefixes, history = model(tokens), model(tokens, all_positions=True), model.settle(tokens).history
    names = [(name, p.requires_grad) for name, p in model.named_parameters()]
    assert model.grow(n) is None
    assert torch.equal(model(tokens), before)
    assert torch.equal(model(tokens, all_positions=True), prefixes)
    assert all(torch.equal(a.idx, b.idx) for a, b in zip(model.settle(tokens).history, history, strict=True))
    assert model.config.n_neurons == 96 + n
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == names
    assert model.pool.neuron_signatures.shape == (96 + n, 16)
    assert model.pool.connection_strength.shape == (96 + n, 96 + n)
    assert model.pool.neuron_signatures.dtype == model.pool.threshold.dtype == dtype


@pytest.mark.parametrize("n", [1, 7])
def test_a_dense_pool_grows_by_any_number(n):
    model, tokens = trained_like(), some_tokens()
    before = model(tokens)
    model.grow(n)
    assert torch.equal(model(tokens), before)


@KINDS
def test_a_frozen_matrix_stays_frozen_and_a_copy_is_apart(kind):
    model = trained_like(kind)
    model.pool.connection_strength.requires_grad_(False)
    other = copy.deepcopy(model)
    model.grow(16)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "pool.connection_strength.blocks" if kind else "pool.connection_strength"
    ]
    assert other.config.n_neurons == other.encoder.config.n_neurons == len(other.pool.threshold) == 96


@pytest.mark.parametrize("recruit_threshold", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("old", [0.0, -8.0])
def test_no_input_wakes_a_grown_neuron(recruit_threshold, dtype, old):
    """The inputs that excite each neuron most are among those tried; also in a pool that is hard to excite."""
    model = trained_like(recruit_threshold=recruit_threshold).to(dtype)
    with torch.no_grad():
        model.pool.threshold += old
    model.grow(64, generator=torch.Generator().manual_seed(0))
    norm, signatures = model.encoder.norm, model.pool.neuron_signatures.detach()
    towards = (signatures * norm.weight).detach()
    score = model.pool.score(norm(torch.cat([towards, -towards, torch.randn(500, 16, dtype=dtype)]))).detach()
    old, new = score[:, :96], score[:, 96:]
    assert bool((new.amax(1) < old.topk(12, dim=1).values[:, -1]).all()), "not in an initial pattern"
    assert bool((new.sigmoid() <= recruit_threshold).all()), "not recruited"
    assert new.max() > -40 or recruit_threshold == 0, "yet not further down than need be"


def test_what_new_neurons_are():
    model, other = trained_like(BLOCKS), trained_like(BLOCKS)
    g = torch.Generator().manual_seed(7)
    model.grow(32, generator=g)
    other.grow(32, generator=g.manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert 0.8 < model.pool.neuron_signatures[96:].std() < 1.2
    assert not model.decoder.readout[96:].any()
    strength = model.pool.connection_strength
    assert strength.row_offsets.diff().tolist() == [2] * 8
    assert not strength.to_dense()[96:].any()
    assert not strength.to_dense()[:, 96:].any()
    small_again = trained_like(BLOCKS)
    for name in TABLES:
        assert torch.equal(model.get_parameter(name)[:96], small_again.get_parameter(name)), name
    assert torch.equal(strength.blocks[:12], small_again.pool.connection_strength.blocks)


@KINDS
def test_optimizers_follow(kind):
    model = trained_like(kind)
    optimizers = some_optimizers(model)
    before = {name: [copy.deepcopy(o.state[p]) for o in optimizers] for name, p in model.named_parameters()}
    others = {name: p for name, p in model.named_parameters() if name not in TABLES and "strength" not in name}
    model.grow(16, optimizers=optimizers)
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in optimizers]
    for name, p in model.named_parameters():
        for old, optimizer, ids in zip(before[name], optimizers, held, strict=True):
            assert id(p) in ids, name
            state = optimizer.state[p]
            for key, value in old.items():
                if not isinstance(value, torch.Tensor) or not value.dim():
                    assert state[key] == value, (name, key)
                    continue
                assert state[key].shape == p.shape, (name, key)
                corner = tuple(slice(length) for length in value.shape)
                assert torch.equal(state[key][corner], value), (name, key)
                assert state[key].count_nonzero() == value.count_nonzero(), "zeros in the rest"
    assert all(p is model.get_parameter(name) for name, p in others.items()), "the rest is as it was"
    assert all(len(o.state) == len(list(model.parameters())) for o in optimizers)
    model.prune(torch.arange(96, 112), optimizers=optimizers)
    for name, p in model.named_parameters():
        for old, optimizer in zip(before[name], optimizers, strict=True):
            tensors = [key for key, value in old.items() if isinstance(value, torch.Tensor)]
            assert all(torch.equal(optimizer.state[p][key], old[key]) for key in tensors), name


@KINDS
def test_grown_then_pruned_trains_as_if_nothing_had_been(kind):
    model = trained_like(kind)
    optimizers = some_optimizers(model)
    other = copy.deepcopy((model, optimizers))
    model.grow(16, optimizers=optimizers)
    model.prune(torch.arange(96, 112), optimizers=optimizers)
    assert train(model, optimizers, 3) == train(*other, 3)


@KINDS
def test_grown_neurons_wake_up_in_training(kind):
    model = small(**kind)
    train(model, [torch.optim.AdamW(model.parameters(), lr=1e-2)], 2)
    optimizers = some_optimizers(model)
    model.grow(48, optimizers=optimizers, generator=torch.Generator().manual_seed(0))
    asleep = model.pool.threshold[96:].detach().clone()
    losses = train(model, optimizers, 3)
    assert not (~silent_neurons(model.settle(some_tokens(16)).history))[96:].any(), "without waking they sleep"
    losses += train(model, optimizers, 12, wake=1.0)
    assert all(loss == loss and abs(loss) < 100 for loss in losses)
    awake = ~silent_neurons(model.settle(some_tokens(16)).history)
    assert int(awake[96:].sum()) > 5
    assert awake[:96].any()
    assert (model.pool.threshold[96:] > asleep).all()
    assert model.decoder.readout[96:][awake[96:]].abs().sum() > 0, "and learn"


def test_waken_raises_the_threshold_of_the_silent():
    pool = small().pool
    before = pool.threshold.detach().clone()
    silent = torch.arange(96) % 3 == 0
    pool.waken(silent, rate=0.25)
    assert torch.equal(pool.threshold, before + 0.25 * silent)
    assert pool.threshold.requires_grad
    for wrong, rate, message in (
        (silent[1:], 0.1, r"silent must be \(N,\) = \(96,\) bool, got torch.bool of shape \(95,\)"),
        (silent.float(), 0.1, r"silent must be .* got torch.float32"),
        (silent, 0.0, "rate must be > 0 and finite, got 0.0"),
        (silent, float("nan"), "rate must be > 0 and finite, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.waken(wrong, rate=rate)


FAULTS = [
    ("grow", dict(n=0), ValueError, "n must be a positive multiple of block_size=16, got 0"),
    ("grow", dict(n=24), ValueError, "n must be a positive multiple of block_size=16, got 24"),
    ("grow", dict(n=16.0), ValueError, r"n must be a positive multiple of block_size=16, got 16\.0"),
    (
        "grow",
        dict(n=16, optimizers=torch.optim.SGD([torch.zeros(1)])),
        TypeError,
        "optimizers must be a list .*got SGD",
    ),
    ("grow", dict(n=16, optimizers="adafactor"), ValueError, "optimizers: state 'row_var' must have its parameter's"),
    ("prune", dict(neurons=torch.arange(32, 47)), ValueError, "neurons must be whole groups .*got a part of group 2"),
    ("prune", dict(neurons=torch.ones(95) > 0), ValueError, r"neurons must be \(N,\) = \(96,\) if it is bool"),
    ("prune", dict(neurons=torch.arange(90, 97)), ValueError, r"neurons must be 1-D with numbers in 0\.\.95"),
    ("prune", dict(neurons=torch.tensor([-1])), ValueError, r"neurons must be 1-D with numbers in 0\.\.95"),
    ("prune", dict(neurons=torch.tensor(3)), ValueError, r"neurons must be 1-D"),
    (
        "prune",
        dict(neurons=torch.zeros(96)),
        TypeError,
        "neurons must be a bool, int32 .*, got torch.float32",
    ),
    ("prune", dict(neurons=[3]), TypeError, "neurons must be a bool, int32 or int64 tensor, got list"),
    (
        "prune",
        dict(neurons=torch.arange(80)),
        ValueError,
        r"final_sparsity must be .*n_neurons=16, got 20",
    ),
    ("prune", dict(neurons=torch.arange(96)), ValueError, "n_neurons must be an integer >= 1, got 0"),
    ("prune", dict(neurons=torch.arange(16), optimizers="adafactor"), ValueError, "optimizers: state 'row_var' must"),
]


@pytest.mark.parametrize(("method", "arguments", "error", "message"), FAULTS, ids=[f[3] for f in FAULTS])
def test_a_fault_is_named_and_changes_nothing(method, arguments, error, message):
    model = trained_like(BLOCKS)
    optimizers = some_optimizers(model)
    if arguments.get("optimizers") == "adafactor":
        optimizers.append(torch.optim.Adafactor(model.parameters()))
        train(model, optimizers, 1)
        arguments = {**arguments, "optimizers": optimizers}
    before, parameters = (
        copy.deepcopy((model.state_dict(), [o.state_dict() for o in optimizers])),
        list(model.parameters()),
    )
    with pytest.raises(error) as raised:
        getattr(model, method)(**arguments)
    assert re.search(message, str(raised.value)), str(raised.value)
    assert model.config.n_neurons == model.decoder.config.n_neurons == 96
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close((model.state_dict(), [o.state_dict() for o in optimizers]), before, rtol=0, atol=0)


def test_a_dense_pool_takes_whole_numbers_only():
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        small().grow(0)
