"""Selectivity against a slow oracle, its control, and the strongest synapses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bio_kernels import BlockSparse

from sprout.analysis import Labels, Observation, selectivity, strongest_synapses, tuning


def seen_of(gates):
    """An observation of settled gates (P, N) alone."""
    gates = np.asarray(gates, dtype=np.float32)
    neuron, position = np.nonzero(gates.T)
    used, first = np.unique(neuron, return_index=True)
    nothing = np.zeros((len(gates), 0))
    return Observation(
        active=(gates > 0).sum(1, keepdims=True),
        jaccard=nothing,
        gate_change=nothing,
        ever=(gates > 0).any(0),
        neuron=used,
        offsets=np.append(first, len(neuron)),
        position=position.astype(np.int32),
        gate=gates.T[neuron, position],
        n_neurons=gates.shape[1],
    )


def labels_of(index):
    index = np.asarray(index)
    return Labels("test", [f"l{i}" for i in range(index.max() + 1)], index)


def sparse_gates(inputs, neurons, rng, share=0.05):
    """Neurons of very different activity, some of them never active."""
    often = np.minimum(1, share * rng.exponential(1, neurons))
    often[::17] = 0
    return np.where(rng.random((inputs, neurons)) < often, rng.uniform(0.2, 0.9, (inputs, neurons)), 0)


def slow_eta(gate, index):
    """Explained over all variance of one neuron's gates (P,)."""
    explained = np.empty(len(gate))
    for name in set(index):
        explained[index == name] = gate[index == name].mean()
    return 0.0 if gate.std() < 1e-12 else explained.var() / gate.var()


def slow_preferred(gate, index):
    """The label that, against all others, explains most, among those that raise the gate."""
    gains = {
        name: slow_eta(gate, (index == name).astype(int))
        for name in set(index)
        if gate[index == name].mean() > gate.mean() + 1e-9
    }
    return max(gains, key=lambda name: (gains[name], -name)) if gains else -1


def test_against_a_slow_oracle(monkeypatch):
    rng = np.random.default_rng(0)
    gates, index = sparse_gates(400, 60, rng, share=0.3).astype(np.float32), rng.integers(0, 7, 400)
    gates[:, 1] = 0.5  # always the same
    gates[:, 2] = (index == 3) * 0.7
    seen, labels = seen_of(gates), labels_of(index)
    found = selectivity(seen, labels, permutations=7, seed=3)
    exact = gates[:, found.neuron].astype(np.float64)
    np.testing.assert_allclose(found.selectivity, [slow_eta(gate, index) for gate in exact.T], atol=1e-12)
    assert found.preferred.tolist() == [slow_preferred(gate, index) for gate in exact.T]
    at = found.neuron.tolist().index
    assert (found.selectivity[at(1)], found.preferred[at(1)]) == (0, -1)
    assert found.selectivity[at(2)] == pytest.approx(1)
    assert found.preferred[at(2)] == 3
    assert found.silent == (~gates.any(0)).sum() > 0
    draw = np.random.default_rng(3)
    control = [
        [slow_eta(gate, shuffled) for gate in exact.T] for shuffled in (draw.permutation(index) for _ in range(7))
    ]
    np.testing.assert_allclose(found.control, np.ravel(control), atol=1e-12)
    ordered = np.sort(found.control)
    assert found.threshold == ordered[int(np.ceil(0.99 * (len(ordered) - 1)))]
    assert found.share == (found.selectivity > found.threshold).mean()
    conditional = [[gate[index == name].mean() for name in range(7)] for gate in exact.T]
    np.testing.assert_allclose(tuning(seen, labels, found.neuron), conditional, atol=1e-7)
    assert not tuning(seen, labels, np.array([0, 17])).any(), "silent neurons"
    for name, limit in (("_ENTRIES", 300), ("_ENTRIES", 1), ("_CELLS", 30)):
        monkeypatch.setattr(f"sprout.analysis.specialisation.{name}", limit)
        again = selectivity(seen, labels, permutations=7, seed=3)
        np.testing.assert_allclose(again.selectivity, found.selectivity, atol=1e-12)
        np.testing.assert_allclose(again.control, found.control, atol=1e-12)
        assert np.array_equal(again.preferred, found.preferred)


@pytest.mark.parametrize("control", ["shuffle", "shift"])
def test_random_labels_make_one_neuron_in_a_hundred_selective(control):
    rng = np.random.default_rng(1)
    seen = seen_of(sparse_gates(1500, 400, rng))
    shares, means = [], []
    for draw in range(12):
        labels = labels_of(rng.choice(20, 1500, p=np.arange(1, 21) / 210))
        found = selectivity(seen, labels, permutations=20, control=control, seed=draw)
        shares.append(found.share)
        means.append(found.control.mean())
    assert 0.005 < np.mean(shares) < 0.016
    assert np.mean(means) == pytest.approx(19 / 1499, rel=0.03), "(L - 1) / (P - 1)"


def test_driven_neurons_are_found_and_others_are_not():
    rng = np.random.default_rng(2)
    index = rng.integers(0, 10, 3000)
    gates = sparse_gates(3000, 300, rng)
    driven = np.arange(1, 300, 3)
    for neuron in driven:
        gates[:, neuron] = np.where((index == neuron % 10) & (rng.random(3000) < 0.5), 0.6, gates[:, neuron])
    found = selectivity(seen_of(gates), labels_of(index), permutations=50)
    above = found.neuron[found.selectivity > found.threshold]
    assert set(driven) <= set(above)
    assert len(above) - len(driven) <= 8
    expected = {neuron: neuron % 10 for neuron in driven}
    assert all(found.preferred[a] == expected[n] for a, n in enumerate(found.neuron) if n in expected)


def test_shifted_labels_are_the_stricter_control_for_runs():
    """Gates and labels that both change slowly, and have nothing to do with each other."""
    rng = np.random.default_rng(3)
    index = np.repeat(rng.integers(0, 5, 100), 20)
    gates = np.repeat(sparse_gates(125, 300, rng, share=0.3), 16, axis=0)
    shares = [selectivity(seen_of(gates), labels_of(index), control=c).share for c in ("shuffle", "shift")]
    assert shares[0] > 0.5
    assert shares[1] < 0.04


def test_the_same_seed_gives_the_same_control():
    rng = np.random.default_rng(4)
    seen, labels = seen_of(sparse_gates(200, 50, rng)), labels_of(rng.integers(0, 5, 200))
    first, again, other = (selectivity(seen, labels, permutations=5, seed=seed).control for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_one_input_and_one_label():
    found = selectivity(seen_of([[0.5, 0.0]]), labels_of([0]), permutations=3)
    assert (found.share, found.silent, found.selectivity.tolist()) == (0, 1, [0])
    nothing = selectivity(seen_of(np.zeros((3, 4))), labels_of([0, 1, 0]), permutations=3)
    assert (nothing.share, nothing.silent, nothing.threshold) == (0, 4, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control": "none"}, "control must be one of 'shuffle', 'shift', got 'none'"),
        ({"permutations": 0}, "permutations must be >= 1, got 0"),
        ({"labels": labels_of([0, 1])}, "labels must be of the P=3 inputs observed, got 2"),
    ],
)
def test_selectivity_refuses(arguments, message):
    labels = arguments.pop("labels", labels_of([0, 1, 0]))
    with pytest.raises(ValueError, match=message):
        selectivity(seen_of(np.eye(3)), labels, **arguments)


def oracle(dense, top, to_itself):
    n = len(dense)
    rows = [(pre, post, dense[pre, post].item()) for pre in range(n) for post in range(n) if to_itself or pre != post]
    return sorted((row for row in rows if row[2]), key=lambda row: -abs(row[2]))[:top]


@pytest.mark.parametrize("to_itself", [False, True])
@pytest.mark.parametrize("chunk", [1 << 22, 700])
@pytest.mark.parametrize("form", ["dense", "block_sparse"])
def test_strongest_synapses(monkeypatch, form, chunk, to_itself):
    monkeypatch.setattr("sprout.analysis.connections._ENTRIES", chunk)
    matrix = BlockSparse.random(64, blocks_per_row=2, block_size=16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        matrix.blocks[0] *= 3
        matrix.blocks[1, :3] = 0
    dense = matrix.to_dense().detach()
    found = strongest_synapses(matrix if form == "block_sparse" else dense, 50, to_itself=to_itself)
    rows = list(zip(found.pre.tolist(), found.post.tolist(), found.strength.tolist(), strict=True))
    assert rows == oracle(dense, 50, to_itself)
    own = torch.eye(64, dtype=torch.bool)
    kept = dense if to_itself else dense.masked_fill(own, 0)
    assert (found.positive, found.negative) == ((kept > 0).sum().item(), (kept < 0).sum().item())
    assert found.largest_self == pytest.approx(dense[own].abs().max().item())
    assert found.n_neurons == 64
    if form == "dense":
        assert found.stored == (64 * 64 if to_itself else 64 * 63)


def test_synapses_that_are_zero_or_equal():
    for empty in (torch.zeros(5, 5), torch.eye(5), torch.ones(1, 1), BlockSparse.from_dense(torch.zeros(32, 32))):
        found = strongest_synapses(empty)
        assert len(found.strength) == found.positive == found.negative == 0
    equal = strongest_synapses(torch.ones(5, 5), 6)
    assert list(zip(equal.pre, equal.post, strict=True)) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 2)]


@pytest.mark.parametrize(
    ("strength", "top", "message"),
    [
        (torch.zeros(2, 3), 5, r"strength must be \(N, N\), got shape \(2, 3\)"),
        (torch.zeros(3, 3), 0, "top must be >= 1, got 0"),
        (torch.full((3, 3), float("nan")), 5, "got NaN; the run that made it has diverged"),
    ],
)
def test_synapses_refuse(strength, top, message):
    with pytest.raises(ValueError, match=message):
        strongest_synapses(strength, top)
