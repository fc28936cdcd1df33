"""Hebbian memory: a slot is bound to the cue that came before it, and found again by that cue."""

from __future__ import annotations

import bio_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALL = 1e-3  # below this squared resemblance nothing is proposed rather than noise


class HebbianMemory(nn.Module):
    """x (B, T, D) -> addresses (B, T, S = T): the slots whose predecessor resembles the token of this step.

    cue(x) = top cue_active of W x, less the next one, at unit length            (B, T, C)
    write:  trace[slot t, :] += cue(x_{t-1})                                     Hebb: what was together is bound
    read:   s_i = trace[slot i, :] . cue(x_t);   address_i = s_i^2 / (sum_j s_j^2 + 0.001)
    The runner-up is the threshold, as in k-winners-take-all circuits, and not 0: with 0 training left one or two cells
    of most cues, some of them the same, and a cell that is cut off does not learn to come back.
    With tied=False what is asked with has a map of its own, and any pairing can be learnt instead of resemblance.
    Parallel (``forward``) and step by step (``write_``, ``read``) are the same function.

    Args: d_model, D; d_cue, C; cue_active in 1..C-1; tied; backend, see bio_kernels.
    """

    def __init__(self, d_model: int, d_cue: int, cue_active: int, tied: bool = True, backend: str = "auto") -> None:
        super().__init__()
        if not 1 <= cue_active < d_cue:
            raise ValueError(f"cue_active must be in 1..d_cue-1={d_cue - 1}, got {cue_active}")
        self.cue_active, self.backend = cue_active, backend
        self.to_cue = nn.Linear(d_model, d_cue, bias=False)
        self.to_question = None if tied else nn.Linear(d_model, d_cue, bias=False)

    def cue(self, x: Tensor, question: bool = False) -> tuple[Tensor, Tensor]:
        """The cue of x (..., D) as its active cells: (index, value), each (..., cue_active), of unit length."""
        project = self.to_question if question and self.to_question is not None else self.to_cue
        value, index = project(x).topk(self.cue_active + 1, -1)
        return index[..., :-1], F.normalize(value[..., :-1] - value[..., -1:], dim=-1, eps=1e-6)

    def cue_rows(self, x: Tensor, question: bool = False) -> Tensor:
        """(..., C): ``cue`` with its zeros."""
        index, value = self.cue(x, question)
        return torch.zeros(*x.shape[:-1], self.to_cue.out_features, dtype=value.dtype, device=x.device).scatter(
            -1, index, value
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> addresses (B, T, T), causal. Gradients: x, parameters; which cells are active is fixed."""
        stored = self.cue_rows(x)
        asked = stored if self.to_question is None else self.cue_rows(x, question=True)
        before = F.pad(stored[:, :-1], (0, 0, 1, 0))
        return self.normalise((asked @ before.transpose(1, 2)).tril())

    @staticmethod
    def normalise(found: Tensor) -> Tensor:
        """found (..., S) >= 0 -> found^2 / (sum found^2 + 0.001)."""
        squared = found.square()
        return squared / (squared.sum(-1, keepdim=True) + _SMALL)

    def start(self, batch_size: int, n_slots: int) -> Tensor:
        """An empty trace (B, C, S): from a cue cell to the slots bound to it."""
        weight = self.to_cue.weight
        return weight.new_zeros(batch_size, len(weight), n_slots)

    def write_(self, trace: Tensor, slot: int, before: Tensor) -> None:
        """Binds slot to the cue of before (B, D), the token before it, in place."""
        index, value = self.cue(before)
        trace[:, :, slot].scatter_add_(1, index, value)

    def read(self, trace: Tensor, x: Tensor) -> Tensor:
        """(B, S): the address that x (B, D) finds in trace (B, C, S); only the active cells' rows are read."""
        index, value = self.cue(x, question=True)
        return self.normalise(bio_kernels.weighted_rows(trace, index, value, backend=self.backend))
