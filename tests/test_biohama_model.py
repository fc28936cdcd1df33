"""The model: causal bit for bit, the same step by step as at once, of the sizes it says, strict about what it gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from biohama import BioHamaConfig, BioHamaModel, Phase
from biohama.config import MODULES
from biohama.generation import StreamModel, free_run
from biohama.objective import phase_at
from biohama.tasks import Batch
from tests.biohama_models import SWITCHES, difference, label, shaken, stepped, tokens_of

EVERY_SWITCH = pytest.mark.parametrize("changes", SWITCHES, ids=label)


def assert_causal(logits_of, tokens: Tensor, cuts: tuple[int, ...]) -> bool:
    """Earlier logits keep their bits; whether any later one changed."""
    before, changed_anything = logits_of(tokens), False
    for cut in cuts:
        other = tokens.clone()
        other[:, cut:] = (other[:, cut:] + 1 + tokens_of(len(tokens), tokens.shape[1] - cut, 29, seed=cut)) % 30
        after = logits_of(other)
        assert after[:, :cut].equal(before[:, :cut]), cut
        changed_anything |= not after[:, cut:].equal(before[:, cut:])
    return changed_anything


@EVERY_SWITCH
@torch.no_grad()
def test_later_tokens_leave_earlier_logits_as_they_are(changes):
    """Bit for bit. A pointer that could point at the next token, the answer, would make every figure wrong."""
    changed = assert_causal(shaken(**changes), tokens_of(3, 24), (1, 2, 9, 16, 23))
    assert changed or len(changes.get("modules", MODULES)) == 1, "one module alone may stay where it is"


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.45, 0.55, 0.65, 0.8, 1.0])
@torch.no_grad()
def test_the_phases_of_training_are_causal(progress):
    for seed, changes in enumerate(({}, {"tied_cue": False, "read_width": 0})):
        model = shaken(seed, **changes)

        def logits_of(tokens, model=model):
            torch.manual_seed(7)  # the same modules are dropped
            return model.trace(tokens, phase_at(progress, 0.1)).logits

        assert assert_causal(logits_of, tokens_of(3, 20), (1, 8, 19))


@torch.no_grad()
def test_every_part_of_a_trace_is_causal():
    model, tokens = shaken(), tokens_of(2, 16)
    other = tokens.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 30
    for phase in (None, phase_at(0.0, 0.1)._replace(drop=0.0), phase_at(0.9, 0.1)):
        torch.manual_seed(7)
        before = model.trace(tokens, phase)
        torch.manual_seed(7)
        after = model.trace(other, phase)
        for name in ("logits", "router", "event_logit", "proposals", "address"):
            assert getattr(before, name)[:, :9].equal(getattr(after, name)[:, :9]), name
        for mine, theirs in zip(before.control, after.control, strict=True):
            assert mine[:, :9].equal(theirs[:, :9])
        for weights in (before.address[:, :, :-1], *before.proposals[..., :-1].unbind(2)):
            assert (weights.triu(1) == 0).all(), "no slot that is not written yet"


def test_earlier_logits_have_no_gradient_from_later_tokens():
    model, tokens = shaken(), torch.arange(12).unsqueeze(0)
    for phase in (phase_at(0.3, 0.1), phase_at(1.0, 0.1)):
        trace = model.trace(tokens, phase)
        # What the later slots would say is in answers; it must not be in the earlier logits.
        (gradient,) = torch.autograd.grad(trace.logits[:, :6].square().sum(), trace.answers)
        assert (gradient[:, 6:-1] == 0).all()
        assert gradient[:, :6].abs().max() > 0


@EVERY_SWITCH
def test_step_by_step_is_the_same(changes):
    """Also when the state has grown beyond its first 64 slots."""
    model, tokens = shaken(2, **changes), tokens_of(3, 70, seed=1)
    assert difference(stepped(model, tokens).exp(), model(tokens).exp()) < 1e-5
    model = model.double()
    assert difference(stepped(model, tokens), model(tokens)) < 1e-9


def test_step_by_step_over_several_doublings():
    model, tokens = shaken(n_slots=150).double(), tokens_of(2, 150)
    assert difference(stepped(model, tokens), model(tokens)) < 1e-9


def test_ties_are_read_alike_step_by_step_and_at_once():
    """Few symbols, so that many slots resemble the cue equally, more than a read may combine."""
    model, tokens = shaken(1, modules=("hebb",), winner_take_all=False), tokens_of(2, 60, vocab_size=4)
    for dtype, rounding in (
        (torch.float32, 1e-4),
        (torch.float64, 1e-9),
    ):  # a cue is a difference
        whole = model.to(dtype)(tokens)
        assert difference(stepped(model, tokens), whole) < rounding
        assert difference(model(tokens[:, :33]), whole[:, :33]) < rounding


@torch.no_grad()
def test_fewer_slots_than_a_read_combines():
    model = shaken(n_slots=5, read_width=8, winner_take_all=False)
    tokens = tokens_of(2, 5)
    assert difference(stepped(model, tokens), model(tokens)) < 1e-5


@EVERY_SWITCH
@torch.no_grad()
def test_samples_do_not_see_each_other(changes):
    """Each alone gives what it gives in a batch, also where the others listen to other modules."""
    model, tokens = shaken(4, **changes), tokens_of(4, 20)
    whole, by_step = model(tokens), stepped(model, tokens)
    for i in (0, 3):
        assert difference(model(tokens[i : i + 1])[0], whole[i]) < 1e-5
        assert difference(stepped(model, tokens[i : i + 1])[0], by_step[i]) < 1e-5
    other = tokens.clone()
    other[1] = tokens_of(1, 20, seed=9)[0]
    kept = [0, 2, 3]
    assert model(other)[kept].equal(whole[kept])
    assert stepped(model, other)[kept].equal(by_step[kept])


@torch.no_grad()
def test_the_same_bits_every_time():
    model, tokens = shaken(), tokens_of(3, 20)
    assert model(tokens).equal(model(tokens))
    assert shaken()(tokens).equal(model(tokens))


@torch.no_grad()
def test_the_sizes_that_are_promised():
    def count(model: BioHamaModel) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    torch.manual_seed(0)
    model = BioHamaModel(BioHamaConfig(vocab_size=100))
    assert model(tokens_of(2, 10, 100)).shape == (2, 10, 100)
    assert 0.95 * 714_420 < count(model) < 1.05 * 714_420
    assert 54_000 < count(BioHamaModel(BioHamaConfig.tiny())) < 66_000
    assert isinstance(model.state_dict(), dict)
    runs: StreamModel = model
    given = torch.ones(2, 4, dtype=torch.bool)
    batch = Batch(tokens_of(2, 4), tokens_of(2, 4), given)
    assert free_run(runs, batch).equal(model(batch.tokens).argmax(-1))


@torch.no_grad()
def test_a_trace_has_the_shapes_it_names():
    model = shaken(modules=("hebb", "stay", "compete"))
    trace = model.trace(tokens_of(2, 7))
    assert trace.names == model.config.modules == ("stay", "compete", "hebb"), "one order, whatever was given"
    shapes = {
        name: tuple(getattr(trace, name).shape) for name in ("logits", "router", "event_logit", "proposals", "address")
    }
    assert shapes == {
        "logits": (2, 7, 30),
        "router": (2, 7, 3),
        "event_logit": (2, 7),
        "proposals": (2, 7, 3, 8),
        "address": (2, 7, 8),
    }
    assert trace.answers.shape == (2, 8, 30)
    assert [tuple(part.shape) for part in trace.control] == [(2, 7, 3), (2, 7), (2, 7), (2, 7)]
    torch.testing.assert_close(trace.router.sum(-1), torch.ones(2, 7))
    assert model.trace(tokens_of(2, 7), Phase()).logits.equal(trace.logits)


@pytest.mark.parametrize("name", MODULES[2:])
@torch.no_grad()
def test_proposals_are_addresses(name):
    for phase in (None, phase_at(0.3, 0.1)._replace(drop=0.0)):
        proposals = shaken(modules=(name,)).trace(tokens_of(3, 30), phase).proposals
        assert proposals.min() >= 0
        assert proposals.sum(-1).max() < 1 + 1e-5


@torch.no_grad()
def test_the_mixture_is_that_of_the_routers_weights():
    """By hand, from the proposals of a soft phase: what is not a winner is mixed as it was proposed."""
    trace = shaken().double().trace(tokens_of(2, 12), phase_at(0.2, 0.1)._replace(drop=0.0))
    mixed = torch.einsum("btm,btms->bts", trace.router, trace.proposals)
    torch.testing.assert_close(trace.address, mixed, rtol=0, atol=1e-12)
    weight, index = trace.address.topk(8)
    by_hand = torch.zeros_like(trace.address).scatter(-1, index, weight) @ trace.answers
    torch.testing.assert_close(trace.logits.exp(), by_hand + 1e-5, rtol=0, atol=1e-12)


@torch.no_grad()
def test_in_use_gates_are_all_or_none_and_in_training_soft():
    model, tokens = shaken(), tokens_of(4, 30)
    for progress, hard in ((None, True), (0.1, False), (0.79, False), (0.8, True), (1.0, True)):
        trace = model.trace(tokens, progress and phase_at(progress, 0.1))
        for gate in (trace.control.own, trace.control.content):
            assert gate.min() >= 0
            assert gate.max() <= 1
            assert ((gate == 0) | (gate == 1)).all() == hard


@torch.no_grad()
def test_logits_are_log_probabilities():
    """They sum to 1 where the address does; what an address leaves out, or a read does not combine, says nothing."""
    tokens = tokens_of(3, 40)
    for name in ("oldest", "newest", "compete", "percept"):
        total = shaken(modules=(name,))(tokens).exp().sum(-1)
        assert (total - 1).abs().max() < 1e-3, name
    for changes in ({}, {"winner_take_all": False}):
        model = shaken(read_width=0, **changes)
        trace = model.trace(tokens)
        torch.testing.assert_close(trace.logits.exp().sum(-1), trace.address.sum(-1) + 30e-5, rtol=0, atol=1e-5)
        assert trace.logits.exp().sum(-1).max() < 1 + 1e-3


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (tokens_of(2, 5).int(), TypeError, "tokens must be an int64 tensor, got torch.int32"),
        (tokens_of(2, 5).float(), TypeError, "tokens must be an int64 tensor, got torch.float32"),
        ([[1, 2]], TypeError, "tokens must be an int64 tensor, got list"),
        (tokens_of(2, 5)[:0], ValueError, r"tokens must be \(B, T\) .* got \(0, 5\)"),
        (tokens_of(2, 5)[:, :0], ValueError, r"tokens must be \(B, T\) .* got \(2, 0\)"),
        (tokens_of(2, 5)[0], ValueError, r"tokens must be \(B, T\) .* got \(5,\)"),
        (tokens_of(2, 13), ValueError, "tokens must be at most n_slots=12 long, got 13"),
        (tokens_of(2, 5) + 30, ValueError, r"tokens must be in 0..vocab_size-1=29, got 3\d..\d\d"),
        (tokens_of(2, 5) - 30, ValueError, r"tokens must be in 0..vocab_size-1=29, got -\d+..-\d+"),
    ],
)
def test_the_model_refuses(tokens, error, message):
    with pytest.raises(error, match=message):
        shaken(n_slots=12)(tokens)


def test_a_step_refuses():
    model, tokens = shaken(n_slots=3), tokens_of(2, 3)
    state = model.start(2)
    with pytest.raises(TypeError, match=r"tokens must be an int64 tensor, got torch\.int32"):
        model.step(tokens[:, 0].int(), state)
    with pytest.raises(ValueError, match=r"tokens must be in 0..vocab_size-1=29, got 30..30"):
        model.step(torch.tensor([30, 30]), state)
    for t in range(3):
        _, state = model.step(tokens[:, t], state)
    with pytest.raises(ValueError, match="tokens must be at most n_slots=3 long, got 4"):
        model.step(tokens[:, 0], state)
    for size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got"):
            model.start(size)


@pytest.mark.default_memory
def test_forward_compiles_whole():
    """No graph breaks; a compiled trace is the same function with the same gradients."""
    torch.compiler.reset()
    model, tokens = shaken(), tokens_of(2, 3)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens)
    assert difference(whole, model(tokens)) < 1e-5
    gradients = [torch.autograd.grad(logits.sum(), model.embedding.weight) for logits in (whole, model(tokens))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=0), "vocab_size must be an integer >= 1, got 0"),
        (dict(d_model=1.5), "d_model must be an integer >= 1, got 1.5"),
        (dict(d_hidden=True), "d_hidden must be an integer >= 1, got True"),
        (dict(n_slots="8"), "n_slots must be an integer >= 1, got '8'"),
        (dict(n_rounds=-1), "n_rounds must be an integer >= 0, got -1"),
        (dict(read_width=-1), "read_width must be an integer >= 0, got -1"),
        *((dict(n_senders=n), f"n_senders must be an integer in 2..12 .*, got {n}") for n in (1, 13)),
        (dict(modules=("hebb",), n_senders=6), "n_senders must be an integer in 2..5 .*, got 6"),
        (dict(cue_active=512), r"cue_active must be an integer in 1..511 \(d_cue - 1\), got 512"),
        (dict(n_heads=5), "d_node must be a multiple of n_heads=5, got 96"),
        (dict(threshold=1.0), "threshold must be a number with 0 <= threshold < 1, got 1.0"),
        (dict(threshold=float("nan")), "threshold must be .* got nan"),
        (dict(tied_cue=1), "tied_cue must be true or false, got 1"),
        (dict(winner_take_all="yes"), "winner_take_all must be true or false, got 'yes'"),
        (dict(inhibition=None), "inhibition must be true or false, got None"),
        (dict(backend="cuda"), "backend must be one of 'auto', .*, got 'cuda'"),
        (dict(modules=()), r"modules must be names out of forward, .* got \(\)"),
        (dict(modules="hebb"), "modules must be names out of forward, .* got 'hebb'"),
        (dict(modules=("hebb", "hebb")), "modules must be different names .* got 'hebb'"),
        (dict(modules=("hebbian",)), "modules must be different names out of .* got 'hebbian'"),
    ],
)
def test_a_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        BioHamaConfig(**changes)


def test_a_config_refuses_typos_and_sorts_its_modules():
    with pytest.raises(TypeError, match="n_sender"):
        BioHamaConfig(n_sender=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="d_modl"):
        BioHamaConfig.tiny(d_modl=3)
    assert BioHamaConfig(modules=list(reversed(MODULES))) == BioHamaConfig()  # pyright: ignore[reportArgumentType]
