"""What BioHama is trained on: its answer, what every module would have answered alone, and the router's credit.

Everything is learnt soft, as one likelihood: P(y) = sum over slots of address_i P(y | slot i). What the model does in
use, one winner, a state that changes at events, is where the soft solution goes when noise and two penalties have made
it sure of itself. Only in the last fifth, nothing hard is trained through before, all is decided as in use, and the
rest learns to live with it: what a gate told by being open now and then, on many tokens, it does not tell any more.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .competition import EXCLUDED, FOCUS
from .model import BioHamaModel, Phase, Trace
from .tasks.base import IGNORE

PARTS = ("exploration", "modules", "responsibility", "credit", "rest", "quiet")
_REST, _QUIET = 0.3, 0.05  # what an open event and an open ``own`` cost, nats per unit of their logit
DECIDED = 0.8  # of the training: from then on the model is as in use
_NARROW = 0.3  # nats per symbol by which a module must be better to get e times the share of a sequence


def ramp(progress: float, start: float, end: float) -> float:
    """0 until start, 1 from end, linear between."""
    return min(1.0, max(0.0, (progress - start) / (end - start)))


def phase_at(progress: float, threshold: float, explore: bool = True) -> Phase:
    """How soft the model is at progress 0..1 of its training; threshold is the router's in the end.

    The router's even floor fades from 0.5 by 0.5, absent modules from 0.15 by 0.6; its threshold rises from 0.3 to 0.6,
    the exclusion of slots without content and the queue's focus from 0.3 to 0.7, the noise of the gates from 0.2 to
    0.45, that of content, which several modules have to agree about first, from 0.45 to 0.7. From 0.8 nothing is soft.
    """
    decided = progress >= DECIDED
    return Phase(
        floor=0.5 * (1 - ramp(progress, 0.0, 0.5)) if explore else 0.0,
        drop=0.15 * (1 - ramp(progress, 0.0, 0.6)) if explore else 0.0,
        threshold=threshold * ramp(progress, 0.3, 0.6),
        hard=decided,
        decided=decided,
        noise=ramp(progress, 0.2, 0.45),
        content_noise=ramp(progress, 0.45, 0.7),
        excluded=EXCLUDED * ramp(progress, 0.3, 0.7),
        focus=1 + (FOCUS - 1) * ramp(progress, 0.3, 0.7),
    )


def training_loss(
    model: nn.Module, batch: Any, progress: float, without: Collection[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch at progress 0..1 of the training, and its parts by name.

    Args: model, a BioHamaModel, or any other model of tokens (B, T) -> logits (B, T, V), which learns by cross-entropy
        alone; batch, with tokens and targets (B, T), IGNORE = -100 where nothing is scored; without, of PARTS, what to
        leave out: exploration (floor, absent modules), modules (their own loss), responsibility
        (every module learns every sequence), credit (the router's), rest, quiet (penalties of events and of ``own``).
    Returns: a scalar with gradients, and detached scalars.
    Raises: ValueError for an unknown part, or nothing scored; TypeError for a BioHamaModel that is wrapped.
    """
    for name in [without] if isinstance(without, str) else without:
        if name not in PARTS:
            raise ValueError(f"without must be names out of {', '.join(PARTS)}, got {name!r}")
    scored = batch.targets != IGNORE
    if not bool(scored.any()):
        raise ValueError(f"batch must have at least one scored target, got only {IGNORE}")
    if isinstance(getattr(model, "_orig_mod", getattr(model, "module", None)), BioHamaModel):
        raise TypeError(f"model must be a BioHamaModel itself: in a {type(model).__name__} its parts are not seen")
    if not isinstance(model, BioHamaModel):
        loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        return loss, {"answer": loss.detach()}
    trace = model.trace(batch.tokens, phase_at(progress, model.config.threshold, "exploration" not in without))
    alone = own_answers(trace, batch.targets)[scored]
    share = 0.0 if "responsibility" in without else ramp(progress, 0.1, 0.3)
    parts = {
        "answer": F.nll_loss(trace.logits[scored], batch.targets[scored]),
        "modules": (1 - progress) * module_loss(alone, scored, share),
        "credit": ramp(progress, 0.5, 0.7)
        * -(trace.control.router_logit[scored].log_softmax(-1) + alone).logsumexp(-1).mean(),
        "rest": _REST * calm(trace.event_logit, progress),
        "quiet": _QUIET * calm(trace.control.own_logit, progress),
    }
    loss = torch.stack([value for name, value in parts.items() if name not in without]).sum()
    return loss, {name: value.detach() for name, value in parts.items()}


def own_answers(trace: Trace, targets: Tensor) -> Tensor:
    """(B, T, M): log P(target) of every module alone; without meaning where targets (B, T) are IGNORE."""
    wanted = targets.clamp(min=0).unsqueeze(1).expand(-1, trace.answers.shape[1], -1)
    right = trace.answers.gather(2, wanted).transpose(1, 2)  # (B, T, S + 1): P(target_t | slot_i)
    return (torch.einsum("btms,bts->btm", trace.proposals, right) + 1e-4).log()


def module_loss(alone: Tensor, scored: Tensor, share: float) -> Tensor:
    """What the modules' own answers cost, so that each learns its job also while it is not chosen.

    alone (P, M), log P of the P scored positions of scored (B, T); share 0..1 of the weight goes to the modules that
    explain a whole sequence best, the rest to all alike: a module should not be bent to what another one can do.
    """
    sample, m = scored.nonzero()[:, 0], alone.shape[1]
    length = scored.sum(1, keepdim=True)
    cost = alone.new_zeros(len(scored), m).index_add(0, sample, -alone)
    best = (-cost.detach() / length.clamp(min=1) / _NARROW).softmax(1)
    return (((1 - share) / m + share * best) * cost).sum() / length.sum()


def calm(logit: Tensor, progress: float) -> Tensor:
    """What open gates cost, softplus of the logit: one that is wide open feels it too. Nothing once all is decided."""
    return ramp(progress, 0.15, 0.35) * (progress < DECIDED) * F.softplus(logit).mean()
