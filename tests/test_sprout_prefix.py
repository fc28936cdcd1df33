"""Prefix mode, generation: every prefix has its own pattern, and is treated as if it were alone."""

import pytest
import torch
import torch.nn.functional as F

from sprout.objective import balance_loss, next_token, settling_loss
from sprout.sampling import likeliest
from tests.sprout_models import pattern_of, small, some_tokens, wired

READERS = pytest.mark.parametrize(
    "reader", [{}, {"n_encoder_layers": 0, "conv_width": 4}], ids=["layers", "convolution"]
)


@READERS
@pytest.mark.parametrize("connection", ["dense", "block_sparse"])
@pytest.mark.parametrize("steps", [0, 3])
def test_prefix_logits_are_those_of_the_prefix_alone(connection, steps, reader):
    model = wired(small(connection=connection, blocks_per_row=2, n_interaction_steps=steps, **reader)).double().eval()
    tokens = some_tokens(3, 7)
    logits = model(tokens, all_positions=True)
    assert logits.shape == (3, 7, 50)
    for t in range(7):
        torch.testing.assert_close(logits[:, t], model(tokens[:, : t + 1]), rtol=0, atol=1e-10)


def test_prefix_patterns_are_those_of_the_prefix_alone():
    model, tokens = wired(small()).double().eval(), some_tokens(2, 5)
    whole = model.settle(tokens, all_positions=True)
    assert whole.states.shape == (10, 20, 16)
    assert whole.score.shape == (10, 96)
    for t in range(5):
        rows = torch.tensor([t, 5 + t])
        for every, alone in zip(whole.history, model.settle(tokens[:, : t + 1]).history, strict=True):
            assert torch.equal(every.idx[rows], alone.idx)
            torch.testing.assert_close(every.gate[rows], alone.gate, rtol=0, atol=1e-10)


@READERS
def test_later_tokens_change_nothing(reader):
    """Bit for bit: a leak of later tokens would make every figure of a language model wrong."""
    model, tokens = wired(small(**reader)), some_tokens(2, 8)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 50
    before, after = (model(x, all_positions=True) for x in (tokens, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


@READERS
@pytest.mark.parametrize("left", [False, True])
def test_prefix_mode_with_padding(left, reader):
    model, tokens = wired(small(**reader)).double().eval(), some_tokens(1, 6)
    junk = some_tokens(1, 3, seed=3)
    padded = torch.cat([junk, tokens] if left else [tokens, junk], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6 if left else [1] * 6 + [0] * 3])
    logits = model(padded, mask, all_positions=True)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[mask.bool()], model(tokens, all_positions=True)[0], rtol=0, atol=1e-10)


def test_gradients_of_prefix_mode_are_the_sum_over_prefixes():
    model, tokens = wired(small()).double(), some_tokens(2, 4)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad for p in model.parameters()]

    together = gradients(model(tokens, all_positions=True).logsumexp(-1).sum())
    alone = gradients(sum(model(tokens[:, : t + 1]).logsumexp(-1).sum() for t in range(4)))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_a_model_that_sees_ahead_has_no_prefix_mode():
    model, tokens = wired(small(causal=False)), some_tokens()
    assert model(tokens).shape == (3, 50)
    with pytest.raises(ValueError, match="all_positions=True needs a model with causal=True"):
        model(tokens, all_positions=True)
    with pytest.raises(ValueError, match="generate needs a model with causal=True"):
        model.generate(tokens, 1)


def test_causal_or_not_differ_only_in_what_early_tokens_see():
    """A single token has nothing before or behind it."""
    tokens = some_tokens(4, 1)
    assert torch.equal(small(causal=False)(tokens), small()(tokens))
    assert not torch.allclose(small(causal=False)(some_tokens()), small()(some_tokens()))


def test_the_objective_is_cross_entropy_and_its_terms():
    model, tokens = wired(small()).double(), some_tokens(2, 6)
    o = next_token(model, tokens, balance=0.5, settling=2.0)
    logits = model(tokens[:, :-1], all_positions=True)
    torch.testing.assert_close(o.language, F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:]))
    torch.testing.assert_close(o.loss, o.language + 0.5 * o.balance + 2.0 * o.settling)
    assert o.history[0].idx.shape == (10, 20)
    for term in (o.balance, o.settling):
        model.zero_grad()
        term.backward(retain_graph=True)
        assert model.pool.neuron_signatures.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\+1\)"):
        next_token(model, tokens[:, :1])
    assert settling_loss(o.history[:1]) == 0


def test_balance_is_one_when_even_and_its_gradient_lifts_the_silent():
    first = pattern_of([[0, 1], [2, 3], [4, 5], [6, 7]], [[0.5, 0.5]] * 4, n=8)
    assert balance_loss(torch.zeros(4, 8, dtype=torch.float64), first).item() == pytest.approx(1.0)
    crowd = pattern_of([[0, 1]] * 4, [[0.5, 0.5]] * 4, n=8)
    score = torch.where(torch.arange(8) < 2, 20.0, 0.0).double().repeat(4, 1)
    assert balance_loss(score, crowd).item() == pytest.approx(4.0, rel=1e-6), "N / k"
    score = torch.zeros(4, 8, dtype=torch.float64, requires_grad=True)
    balance_loss(score, crowd).backward()
    assert (score.grad[:, :2] > 0).all(), "descent lowers the scores of busy neurons"
    assert (score.grad[:, 2:] < 0).all(), "and raises those of silent ones"


def test_generate_appends_and_repeats_by_seed():
    model, tokens = wired(small()).eval(), some_tokens(2, 5)
    once, again, other = (model.generate(tokens, 30, seed=seed) for seed in (3, 3, 4))
    assert once.shape == (2, 35), "longer than max_seq_len=24: the context is cropped"
    assert torch.equal(once[:, :5], tokens)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(model.generate(tokens, 0), tokens)
    state = torch.get_rng_state()
    model.generate(tokens, 2, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "a seed leaves the global generator alone"


def test_greedy_generation_is_argmax_of_each_prefix():
    model, tokens = wired(small()).eval(), some_tokens(2, 5)
    out = model.generate(tokens, 4, temperature=0)
    assert torch.equal(model.generate(tokens, 4, temperature=1e-39, seed=0), out), "logits that would overflow"
    for t in range(5, 9):
        assert torch.equal(out[:, t], model(out[:, :t]).argmax(1))
    assert torch.equal(model.generate(tokens, 4, top_k=1), out)
    assert torch.equal(model.generate(tokens, 4, top_p=1e-9), out)


def test_top_k_and_top_p_by_hand():
    inf = float("inf")
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert (likeliest(logits, 2, None) > -inf).tolist() == [[False, True, False, True]]
    assert (likeliest(logits, None, 0.4) > -inf).tolist() == [[False, True, False, False]]
    assert (likeliest(logits, None, 0.41) > -inf).tolist() == [[False, True, False, True]]
    assert (likeliest(logits, 3, 0.99) > -inf).tolist() == [[False, True, True, True]]
    assert torch.equal(likeliest(logits, 9, 1.0), logits)
    ties = likeliest(torch.zeros(1, 5), 2, None)
    assert (ties > -inf).tolist() == [[True, True, False, False, False]]


def test_draws_follow_the_distribution():
    model = small().eval()
    tokens = some_tokens(1, 4).expand(4000, 4)
    drawn = model.generate(tokens, 1, temperature=0.5, seed=0)[:, -1].bincount(minlength=50) / 4000
    expected = (model(tokens[:1]) / 0.5).softmax(1)[0]
    assert (drawn - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer >= 0, got -1"),
        ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a finite"),
        ({"top_k": 0}, "top_k must be an integer >= 1 or None, got 0"),
        ({"top_p": 0.0}, r"top_p must be a number in \(0, 1\] or None, got 0.0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, r"tokens must be \(B, T\) with B, T >= 1, got \(1, 0\)"),
        ({"tokens": torch.tensor([[50]])}, r"tokens must be in 0..vocab_size-1=49"),
    ],
)
def test_bad_arguments_of_generate(changes, message):
    arguments = {"tokens": some_tokens(), "max_new_tokens": 1, **changes}
    with pytest.raises(ValueError, match=message):
        small().generate(**arguments)
