"""What a batch is learnt from and what is measured on the way; the same for SPROUT and its controls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import BrainLikeSprout
from .objective import Objective, next_token
from .pattern import ActivationPattern, gate_change, jaccard
from .sharded_pool import absent, leave_to_owners


class Learner(nn.Module):
    """A model with its objective: forward(tokens (B, T+1) int64) -> Objective, so that a wrapper sees one forward."""

    def __init__(self, model: nn.Module, balance: float = 0.0, settling: float = 0.0) -> None:
        super().__init__()
        if isinstance(getattr(model, "_orig_mod", getattr(model, "module", None)), BrainLikeSprout):
            raise TypeError(f"model must be a BrainLikeSprout itself: in a {type(model).__name__} its pool is not seen")
        self.model, self.balance, self.settling = model, balance, settling
        leave_to_owners(self)

    def forward(self, tokens: Tensor) -> Objective:
        """As ``next_token``; of a model without a pool only the language term, and no history."""
        if isinstance(self.model, BrainLikeSprout):
            return next_token(self.model, tokens, balance=self.balance, settling=self.settling)
        logits = self.model(tokens[:, :-1], all_positions=True)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        nothing = loss.new_zeros(())
        return Objective(loss, loss, nothing, nothing, [])


def random_windows(tokens: Tensor, batch_size: int, window: int, generator: torch.Generator) -> Tensor:
    """(batch_size, window + 1) int64 from uniformly random places of tokens (L,), with replacement; L > window."""
    starts = torch.randint(len(tokens) - window, (batch_size,), generator=generator)
    return tokens[starts.unsqueeze(1) + torch.arange(window + 1)]


def all_windows(tokens: Tensor, batch_size: int, window: int) -> Iterator[Tensor]:
    """Every token but the first is a target once: batches (<= batch_size, window + 1), then the rest as one row."""
    whole = (len(tokens) - 1) // window
    if whole:
        yield from tokens[: whole * window + 1].unfold(0, window + 1, window).split(batch_size)
    if whole * window + 1 < len(tokens):
        yield tokens[whole * window :].unsqueeze(0)


def pattern_figures(history: list[ActivationPattern]) -> dict[str, float]:
    """Active neurons (mean, min, max over samples), Jaccard and gate change of the last step; {} without a pool."""
    if not history:
        return {}
    count = history[-1].count
    figures = {
        "active_mean": count.double().mean().item(),
        "active_min": int(count.min()),
        "active_max": int(count.max()),
    }
    if len(history) > 1:
        figures["jaccard"] = jaccard(*history[-2:]).double().mean().item()
        figures["gate_change"] = gate_change(*history[-2:]).double().mean().item()
    return figures


@dataclass
class Evaluation:
    """Sums over batches, from which ``figures`` makes means; sums of several processes add up."""

    sums: Tensor  # float64: targets, nats, balance, settling, patterns, active, jaccard, gate change, then
    # targets and nats of the scored batches
    low: Tensor
    high: Tensor
    used: Tensor  # (N,) bool

    @classmethod
    def empty(cls, n_neurons: int, device: torch.device) -> Evaluation:
        """Nothing seen yet."""
        low = torch.tensor(torch.iinfo(torch.int64).max, device=device)
        none = torch.zeros(n_neurons, dtype=torch.bool, device=device)
        return cls(torch.zeros(10, dtype=torch.float64, device=device), low, torch.zeros_like(low), none)

    def add(self, result: Objective, n_targets: int, scored: bool) -> None:
        """Counts one batch in; scored, in the score too."""
        history = result.history
        row = torch.zeros_like(self.sums)
        if scored:
            row[8], row[9] = n_targets, result.language.double() * n_targets
        row[0] = n_targets
        row[1:4] = torch.stack([result.language, result.balance, result.settling]).double() * n_targets
        if history:
            count = history[-1].count
            row[4], row[5] = len(count), count.sum()
            self.low, self.high = torch.minimum(self.low, count.min()), torch.maximum(self.high, count.max())
            for pattern in history:
                self.used[pattern.idx[pattern.valid()]] = True
            if len(history) > 1:
                row[6] = jaccard(*history[-2:]).double().sum()
                row[7] = gate_change(*history[-2:]).double().sum()
        self.sums += row

    def figures(self, n_steps: int) -> dict[str, float]:
        """Means over all targets and patterns; those of a pool only where one was seen. {} if nothing was."""
        targets, nats, balance, settling, patterns, active, overlap, change, some, score = self.sums.tolist()
        if not targets:
            return {}
        loss = nats / targets
        figures = {"loss": loss, "score": score / some, "targets": int(targets)}
        figures["perplexity"] = math.exp(min(loss, 700.0))  # beyond it is infinite, which JSON has not
        if patterns:
            figures |= {
                "balance": balance / targets,
                "settling": settling / targets,
                "active_mean": active / patterns,
                "active_min": int(self.low),
                "active_max": int(self.high),
                "used_share": self.used.double().mean().item(),
            }
        if patterns and n_steps:
            figures |= {"jaccard": overlap / patterns, "gate_change": change / patterns}
        return figures


@torch.no_grad()
def evaluate(learner: Learner, batches: Iterator[Tensor], first: int, accelerator: Any) -> dict[str, float]:
    """Mean nats per token of the batches and, of a pool, what its patterns did.

    The model is in eval mode meanwhile, and after that in the mode it was in, also where an error is raised.

    "score" is the loss of the first batches alone, to compare evaluations of different length. With several processes
    each takes every n-th batch and all get the figures of all. As many forwards on each, as a spread pool needs.
    """
    config: Any = learner.model.config
    found = Evaluation.empty(config.n_neurons, accelerator.device)
    was_training = learner.model.training
    learner.eval()
    number = -1
    try:
        for number, tokens in enumerate(batches):
            if number % accelerator.num_processes == accelerator.process_index:
                with accelerator.autocast():
                    result = learner(tokens.to(accelerator.device))
                found.add(result, tokens.shape[0] * (tokens.shape[1] - 1), number < first)
        if accelerator.process_index > number % accelerator.num_processes:  # the others had one more
            absent(learner.model)
    finally:
        learner.train(was_training)
    if accelerator.num_processes > 1:
        found.sums = accelerator.reduce(found.sums, "sum")
        found.low = accelerator.gather(found.low.unsqueeze(0)).min()
        found.high = accelerator.gather(found.high.unsqueeze(0)).max()
        found.used = accelerator.gather(found.used.unsqueeze(0).long()).amax(0) > 0
    return found.figures(config.n_interaction_steps)


def per_text(loss: float, n_tokens: int, text: str) -> dict[str, float]:
    """Nats per token as bits per character and per UTF-8 byte of text, which n_tokens tokens stand for."""
    bits = loss * n_tokens / math.log(2)
    return {"bits_per_character": bits / len(text), "bits_per_byte": bits / len(text.encode())}
