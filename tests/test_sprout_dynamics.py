"""Patterns, turnover against a slow oracle, plasticity."""

import pytest
import torch

import sprout
from sprout import gate_change, jaccard
from sprout.interaction import survivors, take_rows
from tests.sprout_models import pattern_of, small, some_tokens, wired


def test_pattern_invariants_hold_at_every_step():
    history = wired(small()).settle(some_tokens(16)).history
    for pattern in history:
        assert pattern.idx.shape == pattern.gate.shape == (16, 20)
        assert pattern.idx.dtype == torch.int64
        for idx, gate, count in zip(pattern.idx, pattern.gate, pattern.count.tolist(), strict=True):
            assert 4 <= count <= 20
            assert (idx[:count].diff() > 0).all()
            assert idx[0] >= 0
            assert idx[count - 1] < 96
            assert (gate[:count] > 0).all()
            assert (gate[:count] < 1).all()
            assert not idx[count:].any()
            assert not gate[count:].any()
    assert len(set(history[-1].count.tolist())) > 1, "the number of active neurons is an outcome"


def test_the_pattern_settles_and_gates_start_unsaturated():
    torch.manual_seed(0)
    model = sprout.create_brain_like_sprout(vocab_size=50, n_neurons=1024, initial_sparsity=64, final_sparsity=96)
    analysis = model.analyze_activation(some_tokens(4))
    first = analysis["activation_history"][0]
    assert first.gate[first.valid()].min() > 0.4
    assert first.gate.max() < 0.95
    assert analysis["jaccard"].min() > 0.7


def test_to_dense_jaccard_and_gate_change():
    old = pattern_of([[0, 3, 7], [2], [4, 5]], [[0.5, 0.25, 1.0], [0.5], [0.1, 0.2]])
    new = pattern_of([[0, 7, 8], [2], [1]], [[0.25, 0.5, 0.125], [0.5], [0.5]])
    dense_old, dense_new = old.to_dense(), new.to_dense()
    assert dense_old.shape == (3, 10)
    assert dense_old[0].tolist() == [0.5, 0, 0, 0.25, 0, 0, 0, 1.0, 0, 0]
    torch.testing.assert_close(jaccard(old, new), torch.tensor([2 / 4, 1.0, 0.0]))
    union = ((dense_old > 0) | (dense_new > 0)).sum(1)
    torch.testing.assert_close(gate_change(old, new), (dense_new - dense_old).abs().sum(1) / union)
    gate = new.gate.clone().requires_grad_()
    gate_change(old, new._replace(gate=gate)).sum().backward()
    assert gate.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="N=10 and B=3, N=11"):
        jaccard(old, new._replace(n_neurons=11))


def test_strongest_breaks_ties_by_index():
    pattern = pattern_of([[9, 1], [1, 5]], [[0.5, 0.25], [0.25, 0.5]])
    top = sprout.model.strongest(pattern, 7, 2)
    assert top["step"] == 7
    assert top["indices"].tolist() == [1, 5]
    assert top["values"].tolist() == [0.25, 0.25]


def slow_turnover(config, idx, gate, drive, age):
    """One sample, one neuron at a time: {neuron: gate} after turnover. idx, gate: lists of the neurons in use."""
    mild = config.turnover_decay**age
    silent = sorted((-drive[n], n) for n in range(config.n_neurons) if n not in idx)
    woken = {n: torch.sigmoid(-d).item() for d, n in silent[: config.recruits_per_step]}
    weakest = config.prune_threshold * mild * sum(gate) / len(gate)
    ranked = [(g + config.hysteresis, n, g) for n, g in zip(idx, gate, strict=True) if g >= weakest]
    ranked += [
        (config.newcomer_scale * w, n, config.newcomer_scale * w)
        for n, w in woken.items()
        if w > 1 - (1 - config.recruit_threshold) * mild
    ]
    stay = {n: g for _, n, g in sorted(ranked, key=lambda r: -r[0])[: config.final_sparsity]}
    for g, n in sorted(((g, n) for n, g in zip(idx, gate, strict=True) if g < weakest), reverse=True):
        if len(stay) < config.min_active:
            stay[n] = g
    return stay


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(recruit_threshold=0.0, newcomer_scale=1.0),  # the budget is full: ranks decide
        dict(prune_threshold=0.99, recruit_threshold=0.99, min_active=10),  # half would leave: min_active stay
        dict(hysteresis=0.0, recruit_threshold=0.0, initial_sparsity=20),
        dict(hysteresis=5.0, recruit_threshold=0.0, newcomer_scale=1.0, initial_sparsity=20, prune_threshold=0.0),
        dict(n_neurons=22, initial_sparsity=20, recruits_per_step=22),  # more recruits than silent neurons
    ],
)
@pytest.mark.parametrize("age", [0, 2])
def test_turnover_against_a_slow_oracle(changes, age):
    model = wired(small(**changes)).double()
    config, interaction, strength = model.config, model.interaction, model.pool.connection_strength
    model.pool.threshold.data[0] = -10.0  # silent at the start
    start = model.encoder(some_tokens(6), model.pool)
    start.score.data[:, 0] = 5.0  # padding slots hold neuron 0, which must be free to enter nevertheless
    gate = torch.where(start.pattern.valid(), torch.rand(6, 20, dtype=torch.float64), 0)
    before = start.pattern._replace(gate=gate)
    wiring = model.pool.wiring(1, 6 * 20)[0]
    drive = before.to_dense() @ strength + start.score
    states, after = interaction.turnover(start.states, before, drive, start.drift, wiring, age)
    for b in range(6):
        count, old = int(after.count[b]), before.idx[b, : int(before.count[b])].tolist()
        assert 0 not in old
        expected = slow_turnover(config, old, gate[b, : len(old)].tolist(), drive[b].detach(), age)
        assert after.idx[b, :count].tolist() == sorted(expected)
        for slot in range(count):
            neuron = int(after.idx[b, slot])
            assert after.gate[b, slot].item() == pytest.approx(expected[neuron], abs=1e-12)
            if neuron in old:
                state = start.states[b, old.index(neuron)]
            else:
                state = model.pool.neuron_signatures[neuron] + start.drift[b]
            assert torch.equal(states[b, slot], state)


def test_turnover_cases_are_not_vacuous():
    """The oracle's cases reach what they claim: a full budget, the min_active floor, no change by hysteresis."""
    final = lambda **changes: wired(small(**changes)).settle(some_tokens(8)).history  # noqa: E731
    assert final(recruit_threshold=0.0, prune_threshold=0.0, turnover_decay=1.0)[-1].count.tolist() == [20] * 8
    few = final(prune_threshold=0.99, recruit_threshold=0.99, n_interaction_steps=5, turnover_decay=1.0)
    assert few[-1].count.tolist() == [4] * 8
    kept = final(hysteresis=5.0, recruit_threshold=0.0, prune_threshold=0.0, initial_sparsity=20)
    assert torch.equal(kept[0].idx, kept[-1].idx)
    lost = final(hysteresis=0.0, recruit_threshold=0.0, newcomer_scale=1.0, prune_threshold=0.0, initial_sparsity=20)
    assert not torch.equal(lost[0].idx, lost[-1].idx)


def test_a_pattern_hardens_with_age():
    """With turnover_decay the pattern of each step is closer to the one before it; without, it goes on changing."""
    model = wired(small(n_interaction_steps=6, turnover_decay=0.5, initial_sparsity=16))
    churning = wired(small(n_interaction_steps=6, turnover_decay=1.0, initial_sparsity=16))
    overlap, restless = (m.analyze_activation(some_tokens(16))["jaccard"].mean(1) for m in (model, churning))
    assert (overlap.diff() >= 0).all()
    assert overlap[-1] > 0.99
    assert overlap[0] < 0.95
    assert restless[-1] < overlap[-1]


def test_survivors_orders_the_classes():
    inf = float("inf")
    rank = torch.tensor(
        [[-1.5, 0.4, -inf, 0.4, -1.2], [-inf, -1.1, -1.1, -inf, -1.9], [float("nan"), 0.1, 0.2, 0.3, 0.4]]
    )
    slot, kept = survivors(rank, 4, 3)
    assert [row[keep].tolist() for row, keep in zip(slot, kept, strict=True)] == [[1, 3, 4], [1, 2, 4], [0, 4, 3, 2]]


def test_take_rows_is_a_gather():
    rows = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    slot = torch.tensor([[4, 0, 2], [1, 3, 0]])
    expected = torch.gather(rows, 1, slot[..., None].expand(-1, -1, 3))
    assert torch.equal(take_rows(rows, slot), expected)
    torch.autograd.gradcheck(take_rows, (rows, slot))


def attention_by_hand(q, k, v, scale, bias, gate):
    """Two heads of 8 over (R, 16) queries and (S, 16) keys and values, with dense softmax."""
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        e = gate * torch.exp(q[:, h] @ k[:, h].T * scale + bias)
        heads.append(e / e.sum(1, keepdim=True) @ v[:, h])
    return torch.cat(heads, 1)


@pytest.mark.parametrize("all_positions", [False, True])
def test_one_step_alone_follows_its_equations(all_positions):
    """Every line of the step but the turnover, written out with dense softmax and the GRU's equations."""
    model = wired(small(recruit_threshold=0.99, prune_threshold=0.0)).double()  # nobody enters or leaves
    start = model.encoder(some_tokens(), model.pool, all_positions=all_positions)
    step, strength = model.interaction, model.pool.connection_strength
    torch.nn.init.normal_(step.gate_head.weight)
    wiring = sprout.Wiring(model.pool.neuron_signatures, strength, strength)
    states, pattern = step.step(start.states, start.pattern, step.stimulus(start), wiring)
    assert torch.equal(pattern.idx, start.pattern.idx)
    assert torch.equal(pattern.count, start.pattern.count)
    for row in range(len(states)):
        sample, last = (row // 9, row % 9) if all_positions else (row, 8)
        x, idx, gate = start.states[row, :12], start.pattern.idx[row, :12], start.pattern.gate[row, :12]
        normed, tokens = step.norm(x), step.token_norm(start.tokens[sample, : last + 1])
        q, k, v = (normed @ step.qkv.weight.T).chunk(3, 1)
        message = attention_by_hand(q, k, v, 8**-0.5, strength[idx][:, idx].T, gate)
        message = message + attention_by_hand(
            normed @ step.look.weight.T, *(tokens @ step.token_kv.weight.T).chunk(2, 1), 8**-0.5, 0.0, 1.0
        )
        cell = step.cell
        gi = message @ cell.weight_ih.T + cell.bias_ih
        gh = x @ cell.weight_hh.T + cell.bias_hh
        reset, update = (gi + gh)[:, :32].sigmoid().chunk(2, 1)
        new = (gi[:, 32:] + reset * gh[:, 32:]).tanh()
        expected = (1 - update) * new + update * x
        torch.testing.assert_close(states[row, :12], expected)
        rate, drive = step.rate_logit.sigmoid(), gate @ strength[idx] + start.score[row]
        target = (step.gate_head(expected).squeeze(1) + drive[idx]).sigmoid()
        torch.testing.assert_close(pattern.gate[row, :12], (1 - rate) * gate + rate * target)


def test_the_decoder_follows_its_equations():
    decoder = small().double().decoder
    pattern = pattern_of([[0, 3, 7], [2]], [[0.5, 0.25, 1.0], [0.5]], n=96)
    states = torch.randn(2, 4, 16, dtype=torch.float64)
    for b, logits in enumerate(decoder(states, pattern)):
        count = int(pattern.count[b])
        gate, held = pattern.gate[b, :count], states[b, :count]
        mean = gate @ held / gate.sum()
        k, v = (decoder.state_norm(held) @ decoder.kv.weight.T).chunk(2, 1)
        q = (decoder.state_norm(mean) @ decoder.query.weight.T).unsqueeze(0)
        found = attention_by_hand(q, k, v, 8**-0.5, 0.0, gate)[0]
        both = torch.cat([gate @ decoder.readout[pattern.idx[b, :count]], found])
        hidden = torch.nn.functional.gelu(decoder.join.weight @ both + decoder.join.bias)
        hidden = mean + decoder.mix.weight @ hidden + decoder.mix.bias
        torch.testing.assert_close(logits, decoder.head(decoder.norm(hidden)))
    torch.testing.assert_close(decoder.head(decoder.features(states, pattern)), decoder(states, pattern))


def test_what_padding_slots_hold_does_not_matter():
    model, tokens = wired(small()).double(), some_tokens()
    start = model.encoder(tokens, model.pool)
    other = start._replace(states=torch.where(start.pattern.valid()[..., None], start.states, 1e3))
    results = [
        model.decoder(states, history[-1])
        for states, history in map(lambda s: model.interaction(s, model.pool), (start, other))
    ]
    assert torch.equal(*results)


def test_a_nan_is_seen():
    model = small()
    with torch.no_grad():
        model.encoder.w_in.weight[0, 0] = float("nan")
    assert model(some_tokens()).isnan().all()


def test_plasticity_is_hebb_on_co_active_pairs():
    model = small().double()
    pattern = pattern_of([[0, 3], [3, 7]], [[0.5, 0.25], [1.0, 0.5]], n=96)
    assert model.plasticity(pattern, eta=0.1) is None
    expected = torch.zeros(96, 96, dtype=torch.float64)
    for pairs in ({0: 0.5, 3: 0.25}, {3: 1.0, 7: 0.5}):
        for p, x in pairs.items():
            for q, y in pairs.items():
                expected[p, q] += 0.1 / 2 * x * y
    strength = model.pool.connection_strength
    torch.testing.assert_close(strength.detach(), expected)
    assert strength.grad is None
    assert strength.requires_grad
    model.plasticity(pattern, eta=100.0, bound=0.2)
    assert strength.max() == 0.2


def test_plasticity_over_a_history_and_with_oja_decay():
    tokens, eta = some_tokens(), 0.05
    model, by_hand = wired(small()), wired(small())
    settled = model.settle(tokens)
    settled.states.sum().backward()
    model.plasticity(settled.history, eta=eta, decay=1.0)
    for pattern in settled.history:
        by_hand.plasticity(pattern, eta=eta / 4, decay=1.0)
    after, again = model.pool.connection_strength, by_hand.pool.connection_strength
    assert torch.equal(after, again)
    assert not torch.equal(after, wired(small()).pool.connection_strength)


def test_plasticity_on_block_sparse_changes_stored_blocks():
    model = small(connection="block_sparse", blocks_per_row=2)
    model.plasticity(model.settle(some_tokens()).history, eta=0.1)
    assert model.pool.connection_strength.blocks.any()


def test_plasticity_errors():
    model = small()
    with pytest.raises(ValueError, match="at least one ActivationPattern"):
        model.plasticity([], eta=0.1)
    with pytest.raises(ValueError, match="n_neurons=96 neurons, got 10"):
        model.plasticity([model.settle(some_tokens()).history[0], pattern_of([[1]], [[0.5]])], eta=0.1)
    assert not model.pool.connection_strength.any(), "nothing is changed when an error is raised"
