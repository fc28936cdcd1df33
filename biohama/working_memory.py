"""Working memory: every token takes a slot; slots are written once, read by address, and erased by use."""

from __future__ import annotations

import bio_kernels
import torch
from torch import Tensor, nn

FLOOR = 1e-5  # of a probability that is read, so that its logarithm is finite


class WorkingMemory(nn.Module):
    """Slots (B, S, D), and a null slot after them that holds what is said when nothing is left.

    write: value_t = x_t + W x_t, W = 0 at the start: a slot says what it holds unless it learns otherwise
    read:  sum_i address_i value_i, over the read_width highest weights of the address (0: over all)
    erase: room_i <- max(0, room_i - amount address_i), how much of a slot is still to be had

    Args: d_model, D; read_width; backend, see bio_kernels.
    """

    def __init__(self, d_model: int, read_width: int = 8, backend: str = "auto") -> None:
        super().__init__()
        self.read_width, self.backend = read_width, backend
        self.to_value = nn.Linear(d_model, d_model, bias=False)
        nn.init.zeros_(self.to_value.weight)
        self.null = nn.Parameter(torch.randn(d_model))

    def write(self, x: Tensor) -> Tensor:
        """What the slots of x (B, S, D) hold, the null slot last: (B, S + 1, D). Gradients: x, parameters."""
        value = x + self.to_value(x)
        return torch.cat([value, self.null.expand(len(x), 1, -1)], 1)

    def read(self, address: Tensor, slots: Tensor) -> Tensor:
        """What T addresses find: address (B, T, S + 1), slots (B, S + 1, any width) -> (B, T, width).

        Gradients: both. Raises: ValueError if slots are not those of the address.
        """
        b, t, n = address.shape
        if slots.shape[:2] != (b, n):
            raise ValueError(f"slots must be (B, S + 1, D) = ({b}, {n}, D) for this address, got {tuple(slots.shape)}")
        if not 0 < self.read_width < n:
            return address @ slots
        flat = address.reshape(b * t, n)  # chosen as in ``read_step``, ties included
        weight, index, _ = bio_kernels.topk_gather(flat, flat.new_zeros(n, 1), self.read_width, backend=self.backend)
        first = torch.arange(b, device=address.device).repeat_interleave(t).unsqueeze(1) * n
        table = slots.reshape(b * n, -1)
        return bio_kernels.weighted_rows(table, index + first, weight, backend=self.backend).view(b, t, -1)

    def read_step(self, address: Tensor, slots: Tensor) -> Tensor:
        """``read`` of one address each: (B, S + 1), (B, S + 1, D) -> (B, D)."""
        if not 0 < self.read_width < address.shape[1]:
            return (address.unsqueeze(1) @ slots).squeeze(1)
        top = bio_kernels.topk_gather(address, slots, self.read_width, backend=self.backend)
        return (top.gate.unsqueeze(1) @ top.rows).squeeze(1)

    @staticmethod
    def erase(room: Tensor, address: Tensor, amount: Tensor) -> Tensor:
        """room (B, n) after address (B, n) was used by amount (B,) in 0..1."""
        return (room - amount.unsqueeze(1) * address).relu()
