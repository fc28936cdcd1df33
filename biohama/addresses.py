"""Addresses over slots: shifts of the last one, first and last content, one winner. Slots are the stream's tokens.

An address (..., S + 1) says how much each of S slots is read, and last how much the null slot is, which stands for
"nothing is left". Every address of step t is zero on the slots after t, which are not written yet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6


def shifted(address: Tensor, by: int) -> Tensor:
    """address (..., S) moved by +1 or -1 slot; what leaves at either end is lost."""
    return F.pad(address[..., :-1], (1, 0)) if by > 0 else F.pad(address[..., 1:], (0, 1))


def oldest(gate: Tensor) -> Tensor:
    """(..., S): g_i prod_{j<i} (1 - g_j), the first slot with content; gate (..., S) in 0..1."""
    silent = (1 - gate).clamp(min=_EPS).log().cumsum(-1)
    return gate * shifted(silent, +1).exp()


def newest(gate: Tensor) -> Tensor:
    """(B, T, S = T): g_i prod_{i<j<=t} (1 - g_j), the last slot with content up to t; gate (B, S) in 0..1."""
    silent = (1 - gate).clamp(min=_EPS).log().cumsum(-1)
    between = silent.unsqueeze(2) - silent.unsqueeze(1)  # [t, i]: sum over i < j <= t
    return gate.unsqueeze(1) * between.clamp(max=0).exp().tril()


def winner(address: Tensor) -> Tensor:
    """One-hot at the highest weight, the lowest slot of a tie; its gradient is the soft address's (straight through)."""
    top = address.detach().argmax(-1, keepdim=True)
    total = address.detach().sum(-1, keepdim=True)
    hard = torch.zeros_like(address).scatter(-1, top, 1.0) * (total > _EPS)
    return hard + address - address.detach()


def written(length: int, device: torch.device) -> Tensor:
    """(T, S = T) bool: slot i is there in step t, i <= t."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()
