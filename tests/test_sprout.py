"""The model as its users type it, the dynamics against a slow oracle, and what it refuses."""

import copy
import pickle

import bio_kernels
import pytest
import torch

import sprout
from sprout import ActivationPattern, BrainLikeSprout, NeuronInteraction, SproutConfig, gate_change, jaccard
from sprout.interaction import survivors, take_rows

SMALL = dict(
    vocab_size=50,
    n_neurons=96,
    d_state=16,
    n_interaction_steps=3,
    initial_sparsity=12,
    final_sparsity=20,
    n_heads=2,
    n_encoder_layers=1,
    max_seq_len=24,
    recruits_per_step=6,
    min_active=4,
)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return sprout.create_brain_like_sprout(**{**SMALL, **changes})


def wired(model, seed=1):
    """The same model with connections that matter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        strength = model.pool.connection_strength
        (strength if isinstance(strength, torch.Tensor) else strength.blocks).normal_(0, 0.3)
    return model


def some_tokens(batch=3, length=9, seed=2):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def pattern_of(idx, gate, n=10):
    """A pattern from lists of different lengths."""
    slots = max(map(len, idx)) + 1
    pad = lambda rows, dtype: torch.tensor([row + [0] * (slots - len(row)) for row in rows], dtype=dtype)  # noqa: E731
    return ActivationPattern(pad(idx, torch.int64), pad(gate, torch.float64), torch.tensor([len(i) for i in idx]), n)


# ------------------------------------------------------------------------------------------------------ what users type


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


# ---------------------------------------------------------------------------------------------------------- the pattern


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


# ------------------------------------------------------------------------------------------------------------- dynamics


def slow_turnover(config, idx, gate, drive):
    """One sample, one neuron at a time: {neuron: gate} after turnover. idx, gate: lists of the neurons in use."""
    silent = sorted((-drive[n], n) for n in range(config.n_neurons) if n not in idx)
    woken = {n: torch.sigmoid(-d).item() for d, n in silent[: config.recruits_per_step]}
    weakest = config.prune_threshold * sum(gate) / len(gate)
    ranked = [(g + config.hysteresis, n, g) for n, g in zip(idx, gate, strict=True) if g >= weakest]
    ranked += [
        (config.newcomer_scale * w, n, config.newcomer_scale * w)
        for n, w in woken.items()
        if w > config.recruit_threshold
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
def test_turnover_against_a_slow_oracle(changes):
    model = wired(small(**changes)).double()
    config, interaction, strength = model.config, model.interaction, model.pool.connection_strength
    model.pool.threshold.data[0] = -10.0  # silent at the start
    start = model.encoder(some_tokens(6), model.pool)
    start.score.data[:, 0] = 5.0  # padding slots hold neuron 0, which must be free to enter nevertheless
    gate = torch.where(start.pattern.valid(), torch.rand(6, 20, dtype=torch.float64), 0)
    before = start.pattern._replace(gate=gate)
    wiring = model.pool.wiring(1, 6 * 20)[0]
    states, after = interaction.turnover(start.states, before, start.score, start.drift, wiring)
    drive = before.to_dense() @ strength + start.score
    for b in range(6):
        count, old = int(after.count[b]), before.idx[b, : int(before.count[b])].tolist()
        assert 0 not in old
        expected = slow_turnover(config, old, gate[b, : len(old)].tolist(), drive[b].detach())
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
    assert final(recruit_threshold=0.0, prune_threshold=0.0)[-1].count.tolist() == [20] * 8
    few = final(prune_threshold=0.99, recruit_threshold=0.99, n_interaction_steps=5)
    assert few[-1].count.tolist() == [4] * 8
    kept = final(hysteresis=5.0, recruit_threshold=0.0, prune_threshold=0.0, initial_sparsity=20)
    assert torch.equal(kept[0].idx, kept[-1].idx)
    lost = final(hysteresis=0.0, recruit_threshold=0.0, newcomer_scale=1.0, prune_threshold=0.0, initial_sparsity=20)
    assert not torch.equal(lost[0].idx, lost[-1].idx)


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


def test_one_step_alone_follows_its_equations():
    """Every line of the step but the turnover, written out with dense softmax and the GRU's equations."""
    model = wired(small(recruit_threshold=0.99, prune_threshold=0.0)).double()  # nobody enters or leaves
    step, start, strength = model.interaction, model.encoder(some_tokens(), model.pool), model.pool.connection_strength
    wiring = sprout.Wiring(model.pool.neuron_signatures, strength, strength)
    states, pattern = step.step(start.states, start.pattern, start.score, start.drift, wiring)
    assert torch.equal(pattern.idx, start.pattern.idx)
    assert torch.equal(pattern.count, start.pattern.count)
    for b in range(3):
        x, idx, gate = start.states[b, :12], start.pattern.idx[b, :12], start.pattern.gate[b, :12]
        q, k, v = (step.norm(x) @ step.qkv.weight.T).chunk(3, 1)
        heads = []
        for h in (slice(0, 8), slice(8, 16)):
            e = gate * torch.exp(q[:, h] @ k[:, h].T / 8**0.5 + strength[idx][:, idx].T)
            heads.append(e / e.sum(1, keepdim=True) @ v[:, h])
        cell = step.cell
        gi = torch.cat(heads, 1) @ cell.weight_ih.T + cell.bias_ih
        gh = x @ cell.weight_hh.T + cell.bias_hh
        reset, update = (gi + gh)[:, :32].sigmoid().chunk(2, 1)
        new = (gi[:, 32:] + reset * gh[:, 32:]).tanh()
        expected = (1 - update) * new + update * x
        torch.testing.assert_close(states[b, :12], expected)
        rate = step.rate_logit.sigmoid()
        torch.testing.assert_close(
            pattern.gate[b, :12], (1 - rate) * gate + rate * step.gate_head(expected).squeeze(1).sigmoid()
        )


def test_the_decoder_follows_its_equations():
    decoder = small().double().decoder
    pattern = pattern_of([[0, 3, 7], [2]], [[0.5, 0.25, 1.0], [0.5]], n=96)
    states = torch.randn(2, 4, 16, dtype=torch.float64)
    for b, logits in enumerate(decoder(states, pattern)):
        count = int(pattern.count[b])
        gate, held = pattern.gate[b, :count], states[b, :count]
        both = torch.cat([gate @ decoder.readout[pattern.idx[b, :count]], gate @ held / gate.sum()])
        hidden = torch.nn.functional.gelu(decoder.join.weight @ both + decoder.join.bias)
        torch.testing.assert_close(logits, decoder.head(decoder.norm(hidden)))


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


# --------------------------------------------------------------------------------------- backends, connections, dtypes


@pytest.mark.parametrize("connection", ["dense", "block_sparse"])
def test_the_dense_twin_agrees(connection):
    sparse = wired(small(connection=connection, blocks_per_row=2, backend="reference")).double()
    dense = small(seed=9, connection=connection, blocks_per_row=2, backend="dense").double()
    dense.load_state_dict(sparse.state_dict())
    tokens = some_tokens()
    assert all(
        torch.equal(a.idx, b.idx) and torch.equal(a.count, b.count)
        for a, b in zip(sparse.settle(tokens).history, dense.settle(tokens).history, strict=True)
    )
    outputs = [model(tokens) for model in (sparse, dense)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    for out in outputs:
        out.logsumexp(1).sum().backward()
    for (name, p), q in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_block_sparse_equals_a_dense_matrix_with_the_same_values():
    sparse = wired(small(connection="block_sparse", blocks_per_row=2)).double()
    dense = small().double()
    state = {k: v for k, v in sparse.state_dict().items() if not k.startswith("pool.connection_strength")}
    dense.load_state_dict({**state, "pool.connection_strength": sparse.pool.connection_strength.to_dense()})
    torch.testing.assert_close(sparse(some_tokens()), dense(some_tokens()), rtol=0, atol=1e-12)


def test_the_connection_matters():
    model, tokens = small(), some_tokens()
    before = model(tokens)
    assert not torch.allclose(before, wired(model)(tokens))


def test_operations_are_looked_up_when_called(monkeypatch):
    calls = []
    for name in ("topk_gather", "sparse_attention", "weighted_rows"):
        op = getattr(bio_kernels, name)

        def counted(*args, _op=op, _name=name, **kwargs):
            calls.append((_name, kwargs["backend"]))
            return _op(*args, **kwargs)

        monkeypatch.setattr(bio_kernels, name, counted)
    small(backend="reference")(some_tokens())
    assert sorted(calls) == sorted(
        [("topk_gather", "reference")] * 4
        + [("sparse_attention", "reference")] * 3
        + [("weighted_rows", "reference")] * 4
    )


def test_autocast_runs_in_bfloat16():
    model, tokens = wired(small()), some_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    logits.float().logsumexp(1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_graph_breaks(masked):
    model, tokens = wired(small(n_interaction_steps=1)), some_tokens()
    mask = torch.arange(9) < torch.tensor([[9], [5], [7]]) if masked else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs, gradients = [], []
    for run in (compiled, model):
        model.zero_grad()
        outputs.append(run(tokens, mask))
        outputs[-1].logsumexp(1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("grad", [True, False])  # without gradient in eval mode torch takes another path in the encoder
@pytest.mark.parametrize("left", [False, True])
def test_padding_is_masked(left, grad):
    model, tokens = wired(small()).double().eval(), some_tokens(1, 6)
    junk = some_tokens(1, 4, seed=3)
    padded = torch.cat([junk, tokens] if left else [tokens, junk], 1)
    mask = torch.tensor([[0] * 4 + [1] * 6 if left else [1] * 6 + [0] * 4])
    with torch.set_grad_enabled(grad):
        expected = model(tokens)
        torch.testing.assert_close(model(padded, mask), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(padded, mask.bool()), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(tokens, torch.ones_like(tokens)), expected, rtol=0, atol=1e-10)
        assert not torch.allclose(model(padded), expected)


def test_samples_do_not_see_each_other():
    model, tokens = wired(small()).double(), some_tokens(4)
    torch.testing.assert_close(model(tokens)[2:3], model(tokens[2:3]), rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- plasticity


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


# -------------------------------------------------------------------------------------------------- copies and printing


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


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(initial_sparsity=200), "initial_sparsity must be an integer in 1..final_sparsity=20, got 200"),
        (dict(final_sparsity=97), "final_sparsity must be an integer in 1..n_neurons=96, got 97"),
        (dict(n_neurons=0), "n_neurons must be an integer >= 1, got 0"),
        (dict(n_neurons=True), "n_neurons must be an integer >= 1, got True"),
        (dict(n_interaction_steps=-1), "n_interaction_steps must be an integer >= 0, got -1"),
        (dict(vocab_size=1.5), "vocab_size must be an integer >= 1, got 1.5"),
        (dict(recruits_per_step=0), "recruits_per_step must be an integer in 1..n_neurons=96, got 0"),
        (dict(min_active=13), "min_active must be an integer in 1..initial_sparsity=12, got 13"),
        (dict(d_state=15), "d_state must be a multiple of n_heads=2, got 15"),
        (dict(prune_threshold=1.0), "prune_threshold must be a number with 0 <= prune_threshold < 1, got 1.0"),
        (dict(recruit_threshold=float("nan")), "recruit_threshold must be a number with 0 <= .* < 1, got nan"),
        (dict(newcomer_scale=0), "newcomer_scale must be a number with 0 < newcomer_scale <= 1, got 0"),
        (dict(hysteresis=float("inf")), "hysteresis must be a number with hysteresis >= 0 and finite, got inf"),
        (dict(dropout="0.1"), "dropout must be a number with 0 <= dropout < 1, got '0.1'"),
        (dict(connection="sparse"), "connection must be one of 'dense', 'block_sparse', got 'sparse'"),
        (dict(backend="cuda"), "backend must be one of 'auto', 'triton', 'reference', 'dense', got 'cuda'"),
        (dict(connection="block_sparse", block_size=24), "block_size must be one of 16, 32, 64, 128, got 24"),
        (dict(connection="block_sparse", block_size=64), "n_neurons must be a multiple of block_size=64, got 96"),
        (dict(connection="block_sparse", blocks_per_row=4), "blocks_per_row must be an integer in .*=3, got 4"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        SproutConfig(**{**SMALL, **changes})


def test_a_typo_gets_the_nearest_name():
    with pytest.raises(TypeError, match="unknown argument 'n_neuron'; did you mean 'n_neurons'"):
        sprout.create_brain_like_sprout(n_neuron=64)
    with pytest.raises(TypeError, match="unknown argument 'qqq'; allowed: vocab_size, n_neurons"):
        sprout.create_brain_like_sprout(qqq=64)


@pytest.mark.parametrize(
    ("tokens", "mask", "error", "message"),
    [
        (some_tokens().int(), None, TypeError, "tokens must be an int64 tensor, got torch.int32"),
        ([[1, 2]], None, TypeError, "tokens must be an int64 tensor, got list"),
        (some_tokens()[0], None, ValueError, r"tokens must be \(B, T\) .*max_seq_len=24, got \(9,\)"),
        (some_tokens(2, 25), None, ValueError, r"tokens must be .*max_seq_len=24, got \(2, 25\)"),
        (some_tokens()[:, :0], None, ValueError, r"tokens must be .* got \(3, 0\)"),
        (some_tokens()[:0], None, ValueError, r"tokens must be .* got \(0, 9\)"),
        (some_tokens() + 49, None, ValueError, r"tokens must be in 0..vocab_size-1=49, got \d+..\d+"),
        (some_tokens() - 50, None, ValueError, r"tokens must be in 0..vocab_size-1=49, got -\d+..-\d+"),
        (
            some_tokens(),
            torch.ones(3, 9),
            TypeError,
            "attention_mask must be a bool or integer tensor, got torch.float32",
        ),
        (some_tokens(), [1], TypeError, "attention_mask must be a bool or integer tensor, got list"),
        (some_tokens(), torch.ones(3, 8).bool(), ValueError, r"attention_mask must .*\(3, 9\), got \(3, 8\)"),
        (some_tokens(), torch.tensor([1, 0, 1])[:, None].expand(3, 9), ValueError, "got none in sample 1"),
    ],
)
def test_model_refuses(tokens, mask, error, message):
    with pytest.raises(error, match=message):
        small()(tokens, mask)


def test_analysis_refuses_a_bad_top_k():
    with pytest.raises(ValueError, match="top_k must be an integer >= 1, got 0"):
        small().analyze_activation(some_tokens(), top_k=0)


def test_parts_are_usable_alone():
    config = SproutConfig(**SMALL)
    pool, encoder = sprout.GlobalNeuronPool(config), sprout.InputToActivation(config)
    states, history = NeuronInteraction(config)(encoder(some_tokens(), pool), pool)
    assert sprout.OutputDecoder(config)(states, history[-1]).shape == (3, 50)
    assert isinstance(BrainLikeSprout(config), torch.nn.Module)
