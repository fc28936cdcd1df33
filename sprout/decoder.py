"""From the settled pattern to logits."""

from __future__ import annotations

import bio_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SproutConfig
from .pattern import ActivationPattern


class OutputDecoder(nn.Module):
    """Logits from which neurons are active (a readout row each) and what they hold (their mean state).

    read = weighted_rows(readout, idx, gate);  mean = sum_j gate_j state_j / sum_j gate_j
    logits = head(LayerNorm(gelu(join([read, mean]))))
    """

    def __init__(self, config: SproutConfig) -> None:
        super().__init__()
        self.config, d = config, config.d_state
        # About initial_sparsity rows are added with gates near one half: their sum starts near unit variance.
        self.readout = nn.Parameter(torch.randn(config.n_neurons, d) * 2 * config.initial_sparsity**-0.5)
        self.join = nn.Linear(2 * d, d)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.vocab_size)

    def forward(self, states: Tensor, pattern: ActivationPattern) -> Tensor:
        """Args: states (B, K, D); pattern of K slots. Returns: logits (B, V). Gradients: states, gates, parameters."""
        gate = pattern.gate
        read = bio_kernels.weighted_rows(self.readout, pattern.idx, gate, backend=self.config.backend)
        total = gate.sum(1, keepdim=True).clamp(min=torch.finfo(gate.dtype).tiny)
        mean = ((gate / total).unsqueeze(1) @ states).squeeze(1)
        return self.head(self.norm(F.gelu(self.join(torch.cat([read, mean], 1)))))

    def extra_repr(self) -> str:
        return f"n_neurons={self.config.n_neurons}, vocab_size={self.config.vocab_size}"
