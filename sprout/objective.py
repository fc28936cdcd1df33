"""What training minimises: the next token's cross-entropy, and two terms for the pool's health."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import BrainLikeSprout
from .paging import GroupedScore, page_index
from .pattern import ActivationPattern, gate_change


class Objective(NamedTuple):
    """loss = language + balance weight * balance + settling weight * settling, each a scalar with gradient.

    language: mean cross-entropy, nats per token. balance: 1 when all neurons wake equally often. settling: mean change
    of a gate in the last step. history: the patterns behind them, one row for each predicted token.
    """

    loss: Tensor
    language: Tensor
    balance: Tensor
    settling: Tensor
    history: list[ActivationPattern]


def next_token(model: BrainLikeSprout, tokens: Tensor, *, balance: float = 0.0, settling: float = 0.0) -> Objective:
    """The objective of predicting tokens[:, 1:], each from all tokens before it, in prefix mode.

    Args: tokens (B, T+1) int64, T in 1..max_seq_len; balance, settling >= 0, the weights of the two terms.
    Returns: Objective over B * T predictions. Raises: as ``BrainLikeSprout.forward``; ValueError if T < 1.
    Gradients: every parameter. Determinism: bitwise on a CPU; on a GPU as far as torch's own attention is.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be (B, T+1) with T >= 1, got {tuple(tokens.shape)}")
    states, history, score = model.settle(tokens[:, :-1], all_positions=True)
    language = F.cross_entropy(model.decoder(states, history[-1]), tokens[:, 1:].flatten())
    even, still = balance_loss(score, history[0]), settling_loss(history)
    return Objective(language + balance * even + settling * still, language, even, still, history)


def balance_loss(score: Tensor | GroupedScore, first: ActivationPattern) -> Tensor:
    """N * sum_n used_n share_n: 1 when the pool is used evenly, up to N / k when all samples wake the same k neurons.

    used_n = fraction of the initial pattern's places that neuron n takes over the batch (no gradient);
    share_n = mean over the batch of softmax(score)_n, whose gradient lowers the scores of busy neurons and so lifts the
    silent ones. In a pool with groups the softmax has two levels, as the choice has: over all groups, then over the
    members of a group; only those of groups in use are looked at, all others have used_n = 0.
    Computed in float32 at least, also under autocast: bfloat16 counts to 256 and no further.
    Args: score (B, N) or GroupedScore; first, the initial pattern. Gradients: score. Source: Fedus et al. 2021, eq. 4.
    """
    weight, count = first.valid(), first.count.sum()
    if isinstance(score, Tensor):
        score = _wide(score)
    else:
        score = score._replace(group=_wide(score.group), member=_wide(score.member))
    if isinstance(score, Tensor):
        used = score.new_zeros(first.n_neurons).index_add_(0, first.idx.flatten(), weight.to(score.dtype).flatten())
        return first.n_neurons * (used / count * score.softmax(1).mean(0)).sum()
    group, groups, member = score
    place = page_index(first.idx, groups, first.n_neurons // group.shape[1])
    used = member.new_zeros(member.shape[1]).index_add_(0, place.flatten(), weight.to(member.dtype).flatten())
    within = member.unflatten(1, (len(groups), -1)).softmax(2)
    share = (group.softmax(1)[:, groups, None] * within).mean(0).flatten()
    return first.n_neurons * (used / count * share).sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def settling_loss(history: list[ActivationPattern]) -> Tensor:
    """Mean over the batch of ``gate_change`` in the last step, 0 without steps. Gradients: both gates."""
    if len(history) < 2:
        return history[-1].gate.new_zeros(())
    return gate_change(*history[-2:]).mean()
