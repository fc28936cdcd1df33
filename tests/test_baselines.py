"""The baselines: causal, the same step by step, and each way of knowing positions does what it is known for."""

from __future__ import annotations

from math import log

import pytest
import torch
import torch.nn.functional as F

from biohama.baselines import KINDS, POSITIONS, Baseline, BaselineConfig, Layer, alibi_slopes, rotated, waves
from biohama.tasks import make_task

MODELS = [("lstm", "nope"), ("gru", "nope"), *(("transformer", position) for position in POSITIONS)]
BIOHAMA = 63_698  # parameters at a vocabulary of 100


def made(kind, position, seed=0, **sizes):
    torch.manual_seed(seed)
    return Baseline(BaselineConfig(kind, position, **{"vocab_size": 20, "width": 32, "n_layers": 2, **sizes}))


def tokens_of(batch, length, vocab_size=20, seed=0):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "position"), MODELS)
def test_later_tokens_leave_earlier_logits_as_they_are(kind, position):
    """Bit for bit, at every cut."""
    model, tokens = made(kind, position), tokens_of(3, 40)
    logits = model(tokens)
    assert logits.shape == (3, 40, 20)
    for cut in (1, 7, 20, 39):
        changed = tokens.clone()
        changed[:, cut:] = tokens_of(3, 40 - cut, seed=1)
        other = model(changed)
        assert other[:, :cut].equal(logits[:, :cut])
        assert not other[:, cut:].equal(logits[:, cut:])


@pytest.mark.parametrize(("kind", "position"), MODELS)
def test_step_by_step_is_the_same(kind, position):
    model, tokens = made(kind, position), tokens_of(3, 60)
    state, stepped, states = model.start(3), [], []
    for t in range(60):
        states.append(state)
        logits, state = model.step(tokens[:, t], state)
        stepped.append(logits)
    assert (torch.stack(stepped, 1) - model(tokens)).abs().max() < 1e-5
    again, _ = model.step(tokens[:, 30], states[30])
    assert again.equal(stepped[30]), "a state stays as it was, so that one may go back to it"
    assert all(isinstance(tensor, torch.Tensor) for tensor in state)


@pytest.mark.parametrize(("kind", "position"), MODELS)
def test_every_parameter_learns(kind, position):
    model, tokens = made(kind, position), tokens_of(4, 12)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("position", POSITIONS)
def test_attention_against_a_loop(position):
    """One layer in float64, query by query and head by head."""
    torch.manual_seed(0)
    layer = Layer(BaselineConfig("transformer", position, width=24, n_heads=3, max_len=64)).double()
    x, h = torch.randn(1, 9, 24, dtype=torch.float64), 8
    q, k, v = layer.qkv(layer.norm_1(x))[0].unflatten(1, (3, 3, h)).unbind(1)
    attended = torch.zeros(9, 3, h, dtype=torch.float64)
    for t in range(9):
        for head in range(3):
            scores = []
            for j in range(t + 1):
                query, key = q[t, head], k[j, head]
                if position == "rope":
                    speed = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
                    turn = torch.polar(torch.ones(4, dtype=torch.float64), (t - j) * speed)
                    query, key = torch.complex(query[:4], query[4:]) * turn, torch.complex(key[:4], key[4:])
                    dot = (query * key.conj()).real.sum()
                else:
                    dot = query @ key
                fall = 2 ** (-8 * (head + 1) / 3) * (t - j) if position == "alibi" else 0
                scores.append(dot / h**0.5 - fall)
            attended[t, head] = torch.stack(scores).softmax(0) @ v[: t + 1, head]
    after = x + layer.out(attended.flatten(1))
    expected = after + layer.down(F.gelu(layer.up(layer.norm_2(after))))
    empty = torch.zeros(1, 3, 0, h, dtype=torch.float64)
    tolerance = 1e-6 if position in ("rope", "alibi") else 1e-12  # their tables are float32
    assert (layer(x, empty, empty)[0] - expected).abs().max() < tolerance


@pytest.mark.parametrize("position", POSITIONS)
def test_without_positions_order_is_nothing(position):
    """One layer, the last token fixed: only NoPE sees its past as a bag."""
    model, tokens = made("transformer", position, n_layers=1), tokens_of(1, 12)
    shuffled = torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], 1)
    change = (model(tokens)[:, -1] - model(shuffled)[:, -1]).abs().max()
    assert change < 1e-5 if position == "nope" else change > 1e-3


@pytest.mark.parametrize("position", POSITIONS)
def test_only_sinusoidal_positions_are_absolute(position):
    """A stream of one token says nothing of where one is, unless positions are added to it."""
    logits = made("transformer", position)(torch.full((1, 30), 5))
    spread = (logits - logits[:, :1]).abs().max()
    assert spread > 1e-2 if position == "sinusoidal" else spread < 1e-5


def test_rope_knows_distances_only():
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    table = waves(2048, 16)
    product = lambda i, j: (rotated(q, table[i : i + 1]) * rotated(k, table[j : j + 1])).sum()  # noqa: E731
    for i, j in ((0, 0), (3, 1), (9, 30)):
        for shift in (1, 100, 2000):
            assert torch.isclose(product(i, j), product(i + shift, j + shift), atol=1e-5)
    assert not torch.isclose(product(3, 1), product(3, 2), atol=1e-3)
    assert torch.isclose(rotated(q, table[700:701]).norm(), q.norm())


def test_waves():
    table = waves(50, 8)
    for t, i in ((0, 0), (1, 0), (7, 2), (49, 3)):
        angle = torch.tensor(t * 10000 ** (-2 * i / 8), dtype=torch.float64)
        assert table[t, :, i].tolist() == pytest.approx([angle.sin().item(), angle.cos().item()], abs=1e-7)


def test_alibi_slopes():
    """Those of the paper for eight heads, and a geometric series down to 1/256 for any number of them."""
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    for n_heads in (1, 3, 4):
        slopes = alibi_slopes(n_heads)
        assert slopes[-1].item() == pytest.approx(1 / 256)
        assert slopes.log2().diff().tolist() == pytest.approx([-8 / n_heads] * (n_heads - 1))


@pytest.mark.parametrize(("kind", "position"), MODELS)
def test_parameter_counts(kind, position):
    v = 101
    model = Baseline(BaselineConfig(kind, position))
    d, gates = model.config.width, {"lstm": 4, "gru": 3}.get(kind, 0)
    layers = 3 * (12 * d * d + 13 * d) + 2 * d if kind == "transformer" else gates * (2 * d * d + 2 * d)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == v * d + layers + v * d + v
    assert count > 1.5 * BIOHAMA
    assert d == (64 if kind == "transformer" else 160)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}, "tables are not saved"


@pytest.mark.parametrize(("kind", "position"), MODELS)
def test_something_is_learnt(kind, position):
    """Thirty steps bring the loss well below that of knowing which symbols are items."""
    model, task = made(kind, position, vocab_size=101), make_task("sort")
    generator, losses = torch.Generator().manual_seed(0), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        batch = task.sample("train", 32, generator)
        loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > log(27)
    assert losses[-1] < log(27) - 0.3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"kind": "rnn"}, "kind must be one of lstm, gru, transformer, got 'rnn'"),
        ({"position": "learnt"}, "position must be one of sinusoidal, rope, alibi, nope, got 'learnt'"),
        ({"vocab_size": 0}, "vocab_size must be an integer >= 1, got 0"),
        ({"width": -1}, "width must be an integer >= 0, got -1"),
        ({"n_layers": 1.0}, "n_layers must be an integer >= 0, got 1.0"),
        ({"n_heads": 0}, "n_heads must be an integer >= 1, got 0"),
        ({"max_len": True}, "max_len must be an integer >= 1, got True"),
        ({"kind": "transformer", "width": 66, "position": "nope"}, "multiple of n_heads with n_heads=4 .* got 66"),
        (
            {"kind": "transformer", "width": 20, "position": "rope"},
            r"multiple of 2 \* n_heads with n_heads=4 .* got 20",
        ),
        ({"kind": "transformer", "width": 9, "n_heads": 3, "position": "sinusoidal"}, "n_heads and even .* got 9"),
    ],
)
def test_config_refuses(sizes, message):
    with pytest.raises(ValueError, match=message):
        BaselineConfig(**sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_models_refuse(kind):
    model = made(kind, "rope", max_len=8)
    for wrong in ([[1, 2]], torch.zeros(1, 2)):
        with pytest.raises(TypeError, match=r"tokens must be \(B, T\) int64"):
            model(wrong)
    for wrong in (torch.zeros(3).long(), torch.zeros(3, 0).long()):
        with pytest.raises(ValueError, match=r"tokens must be \(B, T\) and not empty"):
            model(wrong)
    with pytest.raises(ValueError, match=r"tokens must be in 0..vocab_size-1=19, got 3..20"):
        model(torch.tensor([[3, 20]]))
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        model.start(0)
    with pytest.raises(ValueError, match=r"tokens must be \(B,\) and not empty, got \(1, 1\)"):
        model.step(torch.zeros(1, 1).long(), model.start(1))
    with pytest.raises(TypeError, match="config must be a BaselineConfig, got dict"):
        Baseline({"kind": kind})


def test_max_len():
    model = made("transformer", "sinusoidal", max_len=8)
    tokens = tokens_of(1, 9)
    with pytest.raises(ValueError, match="tokens must be at most max_len=8 long, got 9"):
        model(tokens)
    state = model.start(1)
    for t in range(8):
        _, state = model.step(tokens[:, t], state)
    with pytest.raises(ValueError, match="tokens must be at most max_len=8 long, got 9"):
        model.step(tokens[:, 8], state)
