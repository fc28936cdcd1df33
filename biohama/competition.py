"""Competitive queuing: items compete by a learnt priority, and what has been said is inhibited and cannot return."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .addresses import winner
from .working_memory import WorkingMemory

_GONE, _NO_ROOM = -1e4, 1e-4
_GAIN = 3.0  # of the priorities: an order of 26 symbols has to spread over many units of drive
EXCLUDED = 30.0  # what a slot without content loses in drive: more than any priority can make good
FOCUS = 5.0  # of the softmax: in use the strongest has nearly all


class Competition(nn.Module):
    """x (B, T, D) -> addresses (B, T, S + 1) of the strongest slot that is left; the null slot when none is.

    drive_i    = 3 priority . x_i + log max(content_i, 0.01) - excluded (1 - content_i)
    address_t  = softmax over i <= t of focus (drive_i + log room_i), and of focus null_drive for the null slot
    said_t     = address_{t-1} P(token_t | slot), normalised: which of the proposed slots this step's token came from
    room       <- room - own_t said_t        (not below 0), before address_t is made
    The queue goes its own way whatever the router does, and hears what was said in the end, as an efference copy: a
    wrong proposal costs one step and does not derail the rest. Source of the queue: Grossberg 1978, Bullock 2004.

    Args: d_model, D; inhibition, False: nothing is taken away.
    """

    def __init__(self, d_model: int, inhibition: bool = True) -> None:
        super().__init__()
        self.inhibition = inhibition
        self.priority = nn.Linear(d_model, 1, bias=False)
        nn.init.zeros_(self.priority.weight)  # no order before one is learnt
        self.null_drive = nn.Parameter(torch.tensor(-2.0))

    def drive(self, x: Tensor, content: Tensor, excluded: float = EXCLUDED) -> Tensor:
        """(...) of x (..., D) and content (...) in 0..1."""
        return _GAIN * self.priority(x).squeeze(-1) + content.clamp(min=1e-2).log() - excluded * (1 - content)

    def propose(self, drive: Tensor, room: Tensor, focus: float = FOCUS) -> Tensor:
        """drive and room (B, S), room 0 where there is no slot yet, and focus, as above -> address (B, S + 1)."""
        left = torch.where(room > _NO_ROOM, drive + room.clamp(min=_NO_ROOM).log(), _GONE)
        return (focus * torch.cat([left, self.null_drive.expand(len(drive), 1)], 1)).softmax(1)

    def inhibit(self, room: Tensor, address: Tensor, heard: Tensor, own: Tensor, hard: bool) -> Tensor:
        """room (B, S) after the slots of address (B, S) that explain the token, heard (B, S), were used by own (B,)."""
        if not self.inhibition:
            return room
        said = address * heard
        said = winner(said) * (heard > 0.5) if hard else said / (said.sum(1, keepdim=True) + 1e-3)
        return WorkingMemory.erase(room, said, own)

    def forward(
        self,
        x: Tensor,
        content: Tensor,
        own: Tensor,
        heard: Tensor,
        hard: bool = True,
        excluded: float = EXCLUDED,
        focus: float = FOCUS,
    ) -> Tensor:
        """Args: x (B, T, D); content, own (B, T) in 0..1; heard (B, T, S = T) in 0..1, P(token_t | slot_i); hard, one
            slot is inhibited at a time; excluded and focus as above (training begins with less of both).
        Returns: (B, T, S + 1). Gradients: x, content, own, parameters.
        """
        drive, room, addresses = self.drive(x, content, excluded), torch.zeros_like(content), []
        for t in range(x.shape[1]):
            if t:
                room = self.inhibit(room, addresses[-1][:, :-1], heard[:, t], own[:, t], hard)
            room = torch.cat([room[:, :t], torch.ones_like(room[:, :1]), room[:, t + 1 :]], 1)
            addresses.append(self.propose(drive, room, focus))
        return torch.stack(addresses, 1)
