"""The executive: a recurrent state that changes at events and is kept, exactly, between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Executive(nn.Module):
    """x (B, T, D) -> states h (B, T, H).

    event_t = sigmoid(a . x_t + b)         from the token alone; in use 0 or 1
    h_t     = h_{t-1} + event_t (GRU(x_t, h_{t-1}) - h_{t-1})
    Where event is 0 nothing changes, however long it lasts: a plain GRU drifts over streams longer than those it was
    trained on, and with it everything that it decides. Source of the cell: Cho et al. 2014.
    """

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(d_model, d_hidden)
        self.salience = nn.Linear(d_model, 1)
        nn.init.zeros_(self.salience.weight)
        nn.init.ones_(self.salience.bias)  # every token is an event until it has shown that it is none

    def event(self, x: Tensor) -> Tensor:
        """Logit (...) of tokens x (..., D)."""
        return self.salience(x).squeeze(-1)

    def start(self, batch_size: int) -> Tensor:
        """(B, H), before the first token."""
        return self.cell.weight_hh.new_zeros(batch_size, self.cell.hidden_size)

    def step(self, x: Tensor, h: Tensor, event: Tensor) -> Tensor:
        """h (B, H) after x (B, D) with event (B,)."""
        return torch.lerp(h, self.cell(x, h), event.unsqueeze(1))

    def forward(self, x: Tensor, event: Tensor) -> Tensor:
        """Args: x (B, T, D); event (B, T) in 0..1. Returns: (B, T, H). Gradients: x, event, parameters."""
        h, states = self.start(len(x)), []
        for token, now in zip(x.unbind(1), event.unbind(1), strict=True):
            h = self.step(token, h, now)
            states.append(h)
        return torch.stack(states, 1)
