"""What BioHama is trained on: its answer, what every module would have answered alone, and the router's credit."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import BioHamaModel, Phase

IGNORE = -100


def phase_at(progress: float, threshold: float) -> Phase:
    """How soft the model is at progress 0..1 of training: the router's floor and dropped modules fade by 0.5 and 0.6,
    the threshold rises from 0.3 to 0.6, winners take all from 0.45, the consume gate is binary from 0.85."""
    return Phase(
        floor=0.5 * max(0.0, 1 - progress / 0.5),
        drop=0.15 * max(0.0, 1 - progress / 0.6),
        threshold=threshold * min(1.0, max(0.0, (progress - 0.3) / 0.3)),
        hard=progress >= 9,
        binary=False,
        wake=progress >= 0.7,
        sharp=30 * ramp(progress, 0.3, 0.7),
    )


def ramp(progress: float, start: float, end: float) -> float:
    """0 until start, 1 from end, linear between."""
    return min(1.0, max(0.0, (progress - start) / (end - start)))


def training_loss(model: nn.Module, batch: Any, progress: float, **options: Any) -> tuple[Tensor, dict[str, float]]:
    if not isinstance(model, BioHamaModel):
        loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        return loss, {"answer": loss}
    phase = phase_at(progress, model.config.threshold)
    trace = model.trace(batch.tokens, phase)
    scored = batch.targets != IGNORE
    target = batch.targets[scored]
    answer = F.nll_loss(trace.logits[scored], target)
    b, t, m, s = trace.proposals.shape
    right = trace.answers.gather(2, batch.targets.clamp(min=0).unsqueeze(1).expand(-1, s, -1)).transpose(1, 2)
    p = torch.einsum("btms,bts->btm", trace.proposals, right)[scored]
    logp = (p + 1e-4).log()  # (P, M)
    sample = scored.nonzero()[:, 0]
    n = torch.zeros(b).index_add(0, sample, torch.ones(len(sample))).clamp(min=1)
    nll = torch.zeros(b, m).index_add(0, sample, -logp) / n.unsqueeze(1)
    even = torch.full_like(nll, 1 / m)
    share = ramp(progress, *options.get("share", (0.1, 0.3)))
    if options.get("responsible", True):
        weight = (1 - share) * even + share * (-nll.detach() / options.get("tau", 0.3)).softmax(1)
    else:
        weight = even
    modules = (weight * nll).sum(1)
    modules = (modules * n).sum() / n.sum()
    credit = -(trace.router_logit[scored].log_softmax(-1) + logp).logsumexp(-1).mean()
    c = options.get("credit", (0.5, 0.7))
    event, own = trace.event, trace.control.own
    early = 1 - ramp(progress, 0.65, 0.7)
    rest = early * ramp(progress, *options.get("rest_ramp", (0.25, 0.45))) * event.mean() + (1 - early) * 4 * (event * (1 - event)).mean()
    quiet = early * ramp(progress, 0.25, 0.45) * own.mean() + (1 - early) * 4 * (own * (1 - own)).mean()
    loss = answer + options.get("rest", 0.1) * rest + options.get("quiet", 0.05) * quiet
    loss = loss + (1 - progress) * options.get("module_weight", 1.0) * modules + ramp(progress, *c) * credit
    parts = {"answer": answer, "modules": modules, "credit": credit}
    return loss, {name: value.detach() for name, value in parts.items()}
