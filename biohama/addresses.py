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
    """address (..., S) moved by +1, -1 or 0 slots; what leaves at either end is lost."""
    if by == 0:
        return address
    return F.pad(address[..., :-1], (1, 0)) if by > 0 else F.pad(address[..., 1:], (0, 1))


def oldest(content: Tensor) -> Tensor:
    """(..., S): g_i prod_{j<i} (1 - g_j), the first slot with content g = content (..., S) in 0..1."""
    silent = (1 - content).clamp(min=_EPS).log().cumsum(-1)
    return content * shifted(silent, 1).exp()


def newest(content: Tensor) -> Tensor:
    """(..., S): g_i prod_{j>i} (1 - g_j), the last slot with content g = content (..., S) in 0..1."""
    silent = (1 - content).clamp(min=_EPS).log().cumsum(-1)
    return content * (silent[..., -1:] - silent).exp()


def newest_so_far(content: Tensor) -> Tensor:
    """(B, T, S = T): ``newest`` of the first t + 1 slots for every t; content (B, S)."""
    silent = (1 - content).clamp(min=_EPS).log().cumsum(-1)
    between = silent.unsqueeze(2) - silent.unsqueeze(1)  # [t, i]: sum over i < j <= t
    return content.unsqueeze(1) * between.clamp(max=0).exp().tril()


def winner(address: Tensor) -> Tensor:
    """One-hot at the highest weight of address (..., S), the lowest slot of a tie; all zeros where address is."""
    top = address.argmax(-1, keepdim=True)
    return torch.zeros_like(address).scatter(-1, top, (address.sum(-1, keepdim=True) > _EPS).to(address.dtype))


def first_slot(batch_size: int, n_slots: int, like: Tensor) -> Tensor:
    """(B, S): one-hot at slot 0, where the pointers start."""
    address = like.new_zeros(batch_size, n_slots)
    address[:, 0] = 1
    return address


def corrected(address: Tensor, heard: Tensor, own: Tensor) -> Tensor:
    """The last address in the light of the token that followed it.

    address (B, S); heard (B, S), P(token | slot), no gradient: what was heard is a fact; own (B,) in 0..1, how
    surely that token was the answer read there. Returns: (B, S), address + own (address P / sum address P - address).
    """
    fits = address.detach() * (heard + 1e-3)
    fits = fits / (fits.sum(1, keepdim=True) + _EPS)
    return torch.lerp(address, fits, own.unsqueeze(1))
