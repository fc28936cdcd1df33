"""Writing on: the next token drawn from the model's logits, again and again."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import BrainLikeSprout


@torch.no_grad()
def generate(
    model: BrainLikeSprout,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Tensor:
    """tokens with max_new_tokens drawn ones behind them; the model reads the last max_seq_len of what there is.

    Args:
        model: in the mode (train or eval) that it is in; config.causal, as only such a model was trained on prefixes.
        tokens: (B, T) int64, T >= 1, any length.
        max_new_tokens: >= 0.
        temperature: logits are divided by it; 0 takes the likeliest token, the lowest one of equals.
        top_k: draw among the top_k likeliest tokens (all, if the vocabulary is smaller); None: among all.
        top_p: draw among the likeliest tokens that together have at least this probability, in (0, 1]; None: all.
            After temperature and top_k.
        seed: of the draws, the same on every call; None: torch's global generator.
    Returns: (B, T + max_new_tokens) int64. Raises: ValueError for an argument out of range; as the model's forward.
    Gradients: none. Determinism: the same seed gives the same tokens. Source of top_p: Holtzman et al. 2019.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    if not model.config.causal:
        raise ValueError("generate needs a model with causal=True: this one has not learnt to continue a prefix")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or 0 in tokens.shape:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be (B, T) with B, T >= 1, got {got}")
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    for _ in range(max_new_tokens):
        logits = model(tokens[:, -model.config.max_seq_len :])
        if temperature == 0:
            new = logits.argmax(1, keepdim=True)
        else:
            logits = logits.float()
            logits = logits - logits.amax(1, keepdim=True)  # so that none overflows, however small the divisor
            kept = likeliest(logits / temperature, top_k, top_p)
            new = torch.multinomial(kept.softmax(1), 1, generator=generator)
        tokens = torch.cat([tokens, new], 1)
    return tokens


def likeliest(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """logits (B, V) with -inf for the tokens that top_k and top_p leave out; at least one token of each row stays."""
    if top_k is not None and top_k < logits.shape[1]:
        order = logits.argsort(dim=1, descending=True, stable=True)
        logits = logits.scatter(1, order[:, top_k:], float("-inf"))
    if top_p is not None:
        sorted_logits, order = logits.sort(dim=1, descending=True, stable=True)
        share = sorted_logits.softmax(1)
        enough = share.cumsum(1) - share >= top_p  # what stands before a token already has top_p
        logits = logits.masked_fill(torch.zeros_like(enough).scatter(1, order, enough), float("-inf"))
    return logits


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for an argument of ``generate`` that is out of range."""
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer >= 0, got {max_new_tokens!r}")
    if type(temperature) not in (int, float) or not isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature!r}")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ValueError(f"top_k must be an integer >= 1 or None, got {top_k!r}")
    if top_p is not None and (type(top_p) not in (int, float) or not 0 < top_p <= 1):
        raise ValueError(f"top_p must be a number in (0, 1] or None, got {top_p!r}")
