"""What BioHama is trained on: every part by hand, gradients that arrive and stay finite, and a loss that falls."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from biohama import BioHamaConfig, BioHamaModel, Phase, training_loss
from biohama.baselines import Baseline, BaselineConfig
from biohama.config import MODULES
from biohama.generation import free_run, teacher_forced
from biohama.metrics import seq_right
from biohama.objective import IGNORE, PARTS, calm, module_loss, own_answers, phase_at, ramp
from biohama.tasks import VOCAB_SIZE, Batch, make_task
from tests.biohama_models import difference, shaken, stepped, tokens_of

PROGRESS = (0.0, 0.1, 0.25, 0.4, 0.55, 0.68, 0.75, 1.0)


def batch_of(batch: int = 4, length: int = 12, seed: int = 0) -> Batch:
    """Random streams of which the second half is scored, of the first sample less than of the others."""
    targets = tokens_of(batch, length, seed=seed + 1)
    targets[:, : length // 2] = IGNORE
    targets[0, length - 2 :] = IGNORE
    return Batch(tokens_of(batch, length, seed=seed), targets, targets == IGNORE)


def loss_of(model, batch: Batch, progress: float, without: tuple[str, ...] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)  # which modules are absent
    return training_loss(model, batch, progress, without)


def test_ramps():
    assert [ramp(p, 0.2, 0.6) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_phases_harden():
    """Training starts soft and exploring and ends with the threshold and the exclusion of use."""
    phases = [phase_at(p / 20, 0.1) for p in range(21)]
    first, last = phases[0], phases[-1]
    assert (first.floor, first.drop, first.threshold, first.excluded) == (0.5, 0.15, 0.0, 0.0)
    assert (last.floor, last.drop, last.threshold, last.excluded) == (0.0, 0.0, pytest.approx(0.1), Phase().excluded)
    assert [phase.hard and phase.decided for phase in phases] == [p >= 16 for p in range(21)], "the last fifth"
    assert not any(phase.hard or phase.decided for phase in phases[:16]), "nothing hard is trained through"
    assert all(phase.noise == phase.content_noise == 1 for phase in phases[14:16]), "and by then all gates are noisy"
    for early, late in pairwise(phases):
        assert early.floor >= late.floor
        assert early.drop >= late.drop
        assert early.threshold <= late.threshold
        assert early.excluded <= late.excluded
    still = phase_at(0.0, 0.1, explore=False)
    assert (still.floor, still.drop) == (0, 0)
    assert (phases[0].focus, phases[-1].focus, Phase().focus) == (1, 5, 5)


@torch.no_grad()
def test_the_last_fifth_of_the_training_is_of_the_model_as_it_is_used():
    model, batch = shaken(), batch_of()
    for progress in (0.8, 1.0):
        assert model.trace(batch.tokens, phase_at(progress, model.config.threshold)).logits.equal(model(batch.tokens))
    assert not model.trace(batch.tokens, phase_at(0.79, model.config.threshold)).logits.equal(model(batch.tokens))


def test_in_the_end_gates_are_left_alone_and_the_router_learns():
    model, batch = shaken(), batch_of()
    loss_of(model, batch, 0.9)[0].backward()
    for part in (model.executive.salience, model.own):
        assert not part.weight.grad.any()
    assert model.router.weight.grad.any()


@pytest.mark.parametrize("progress", PROGRESS)
def test_the_loss_is_the_sum_of_its_parts(progress):
    model, batch = shaken(), batch_of()
    loss, parts = loss_of(model, batch, progress)
    assert list(parts) == ["answer", "modules", "credit", "rest", "quiet"]
    assert loss.shape == ()
    assert loss.requires_grad
    for name, part in parts.items():
        assert part.isfinite(), name
        assert part >= 0, name
        assert not part.requires_grad
    assert float(loss.detach()) == pytest.approx(sum(float(part) for part in parts.values()), rel=1e-5)
    for gone in ("modules", "credit", "rest", "quiet"):
        less, _ = loss_of(model, batch, progress, (gone,))
        assert float(less.detach()) == pytest.approx(float(loss.detach() - parts[gone]), rel=1e-5), gone
        less.backward()
    plain, _ = loss_of(model, batch, progress, PARTS)
    torch.manual_seed(5)
    trace = model.trace(batch.tokens, phase_at(progress, model.config.threshold, explore=False))
    scored = batch.targets != IGNORE
    torch.testing.assert_close(plain, F.nll_loss(trace.logits[scored], batch.targets[scored]))


@pytest.mark.parametrize("progress", [0.3, 0.6, 1.0])
def test_every_part_is_its_formula(progress):
    model, batch = shaken(), batch_of()
    _, parts = loss_of(model, batch, progress, ("exploration",))
    torch.manual_seed(5)
    trace = model.trace(batch.tokens, phase_at(progress, model.config.threshold, explore=False))
    scored = batch.targets != IGNORE
    alone = own_answers(trace, batch.targets)[scored]
    modules = (1 - progress) * module_loss(alone, scored, ramp(progress, 0.1, 0.3))
    torch.testing.assert_close(parts["modules"], modules)
    router = trace.control.router_logit[scored].softmax(-1)
    credit = -ramp(progress, 0.5, 0.7) * (router * alone.exp()).sum(-1).log().mean()
    torch.testing.assert_close(parts["credit"], credit)


@pytest.mark.parametrize(("name", "gate"), [("rest", "executive.salience.bias"), ("quiet", "own.bias")])
def test_the_penalties_close_gates(name, gate):
    model, batch = shaken(), batch_of()
    others = tuple(part for part in PARTS if part != name)
    with_, without = (
        torch.autograd.grad(loss_of(model, batch, 0.5, w)[0], model.get_parameter(gate))[0] for w in (others, PARTS)
    )
    assert with_ > without + 1e-4, "descent lowers the logit further"


def test_without_exploration_nothing_is_drawn():
    model, batch = shaken(), batch_of()
    before = torch.get_rng_state()
    one, _ = training_loss(model, batch, 0.1, ["exploration"])
    assert torch.get_rng_state().equal(before)
    other, _ = loss_of(model, batch, 0.1, ("exploration",))
    assert one.equal(other)
    assert not one.equal(loss_of(model, batch, 0.1)[0])


def test_without_responsibility_all_modules_learn_alike():
    model, batch = shaken(), batch_of()
    with_, without = (loss_of(model, batch, 0.5, w)[1]["modules"] for w in ((), ("responsibility",)))
    assert without > with_, "the best module costs less than all on average"
    assert loss_of(model, batch, 0.1)[1]["modules"].equal(loss_of(model, batch, 0.1, ("responsibility",))[1]["modules"])


def test_what_a_module_would_answer_alone_by_hand():
    model, batch = shaken().double(), batch_of()
    trace = model.trace(batch.tokens, phase_at(0.3, 0.1)._replace(drop=0.0))
    alone, scored = own_answers(trace, batch.targets), batch.targets != IGNORE
    assert alone.shape == (4, 12, 8)
    for b, t in scored.nonzero().tolist():
        p = trace.proposals[b, t] @ trace.answers[b, :, batch.targets[b, t]]
        torch.testing.assert_close(alone[b, t], (p + 1e-4).log(), rtol=0, atol=1e-12)


def test_the_loss_of_the_modules_by_hand():
    """Two samples with 1 and 2 scored positions, two modules; the better one of each sample gets most of the weight."""
    scored = torch.tensor([[False, True, False], [True, False, True]])
    alone = torch.tensor([[-1.0, -3.0], [-4.0, -1.0], [-2.0, -0.5]])
    assert float(module_loss(alone, scored, 0.0)) == pytest.approx((1 + 3 + 4 + 1 + 2 + 0.5) / 2 / 3)
    cost, total = [[1.0, 3.0], [6.0, 1.5]], 0.0
    for (a, b), n in zip(cost, (1, 2), strict=True):
        share = 1 / (1 + math.exp(-(b - a) / n / 0.3))  # of the first
        total += share * a + (1 - share) * b
    assert float(module_loss(alone, scored, 1.0)) == pytest.approx(total / 3)
    assert float(module_loss(alone, scored, 1.0)) < 1.0


def test_open_gates_cost_something_once_the_task_is_learnt():
    logit = torch.tensor([-50.0, 50.0])
    assert float(calm(logit, 0.1)) == 0
    assert float(calm(logit, 0.25)) == pytest.approx(12.5)
    assert float(calm(logit, 0.5)) == pytest.approx(25), "how wide they are open, without an end"
    assert float(calm(logit, 0.8)) == 0, "and nothing once all is decided"


@pytest.mark.parametrize("progress", PROGRESS)
def test_gradients_are_finite_whatever_the_model(progress):
    """20 random models in all phases, also with gates and words that are far too sure."""
    for seed in range(20):
        model = shaken(seed, vocab_size=30, tied_cue=bool(seed % 2), read_width=8 * (seed % 3), n_rounds=seed % 3)
        if seed >= 10:
            with torch.no_grad():
                for part in (model.own, model.content, model.executive.salience, model.competition.priority):
                    part.weight.mul_(30)
                model.log_scale.fill_(2.0)
        loss, _ = training_loss(model, batch_of(2, 8, seed), progress)
        loss.backward()
        assert loss.isfinite()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), (seed, name)


def reached(model: BioHamaModel, progress: float = 0.1) -> set[str]:
    loss_of(model, batch_of(8, 12), progress)[0].backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def everything(model: BioHamaModel) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def test_gradients_reach_every_parameter():
    """Of a model as it is made, where some weights start at zero."""
    torch.manual_seed(0)
    for changes in ({}, {"tied_cue": False}, {"n_heads": 4, "n_rounds": 2}):
        model = BioHamaModel(BioHamaConfig.tiny(vocab_size=30, **changes))
        assert reached(model) == everything(model)


def test_parts_that_a_configuration_does_not_use_get_no_gradient():
    def unused(**changes) -> set[str]:
        model = shaken(**changes)
        return everything(model) - reached(model)

    def without(name: str) -> tuple[str, ...]:
        return tuple(other for other in MODULES if other != name)

    assert unused(modules=without("hebb")) == {"hebbian.to_cue.weight"}
    assert unused(modules=without("compete")) == {
        "competition.priority.weight",
        "competition.null_drive",
        "memory.null",
    }
    silent = unused(n_rounds=0)
    assert all(name.startswith(("messages.", "executive.", "sense.", "report.")) for name in silent)
    assert {"sense.weight", "report.weight", "executive.cell.weight_hh"} < silent


@pytest.mark.parametrize("without", [("speed",), ("modules", "Credit"), "pace"])
def test_an_unknown_part_is_refused(without):
    with pytest.raises(ValueError, match=r"without must be names out of exploration, .* got '(speed|Credit|pace)'"):
        training_loss(shaken(), batch_of(), 0.5, without)


def test_a_wrapped_model_is_refused():
    """It would be taken for a baseline, and learn by cross-entropy alone."""
    for wrapped in (torch.compile(shaken()), torch.nn.DataParallel(shaken())):
        with pytest.raises(TypeError, match=r"model must be a BioHamaModel itself: in a .* its parts are not seen"):
            training_loss(wrapped, batch_of(), 0.5)


def test_a_batch_without_a_score_is_refused():
    batch = batch_of()
    for model in (shaken(), Baseline(BaselineConfig("gru", "nope", vocab_size=30, width=16))):
        with pytest.raises(ValueError, match="batch must have at least one scored target, got only -100"):
            training_loss(model, batch._replace(targets=torch.full_like(batch.targets, IGNORE)), 0.5)


def test_a_baseline_learns_by_cross_entropy_alone():
    torch.manual_seed(0)
    model, batch = Baseline(BaselineConfig("gru", "nope", vocab_size=30, width=16)), batch_of()
    loss, parts = training_loss(model, batch, 0.4)
    plain = F.cross_entropy(model(batch.tokens).transpose(1, 2), batch.targets, ignore_index=IGNORE)
    assert difference(loss, plain) < 1e-6
    assert parts == {"answer": loss.detach()}
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_copying_is_learnt():
    """A short training: the loss falls; longer sequences than any seen give the same step by step as at once."""
    torch.manual_seed(0)
    model, task = BioHamaModel(BioHamaConfig.tiny(vocab_size=VOCAB_SIZE)), make_task("copy")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0)
    draws, answers = torch.Generator().manual_seed(0), []
    for step in range(150):
        loss, parts = training_loss(model, task.sample("train", 16, draws), step / 150)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        answers.append(float(parts["answer"]))
    start, end = sum(answers[:5]) / 5, sum(answers[-10:]) / 10
    assert end < 0.25 * start
    batch = task.sample("hard", 8, draws)
    free, forced = free_run(model, batch), teacher_forced(model, batch)
    assert seq_right(free, batch).equal(seq_right(forced, batch))
    assert seq_right(free, batch).float().mean() > 0.5
    with torch.no_grad():
        assert difference(stepped(model, batch.tokens).exp(), model(batch.tokens).exp()) < 1e-5
