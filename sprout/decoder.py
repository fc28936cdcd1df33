"""From the settled pattern to logits."""

from __future__ import annotations

import bio_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SproutConfig
from .paging import sparse_rows
from .pattern import ActivationPattern
from .sharded import ShardedTable


class OutputDecoder(nn.Module):
    """Logits from which neurons are active (a readout row each) and what they hold (their states).

    read = weighted_rows(readout, idx, gate);  mean = sum_j gate_j state_j / sum_j gate_j
    held = multi-head attention from LayerNorm(mean) to LayerNorm(state_j), each weighted by gate_j
    logits = head(LayerNorm(mean + mix(gelu(join([read, held])))))
    A mean alone cannot tell the neurons apart; what is asked of each depends on all of them.
    """

    def __init__(self, config: SproutConfig) -> None:
        super().__init__()
        self.config, d = config, config.d_state
        # Small at the start: who is active is noise until the pool has learnt, and must not drown what the states hold.
        self.readout = nn.Parameter(torch.randn(config.n_neurons, d) * 0.2 * config.initial_sparsity**-0.5)
        self.state_norm = nn.LayerNorm(d)
        self.query = nn.Linear(d, d, bias=False)
        self.kv = nn.Linear(d, 2 * d, bias=False)
        self.join = nn.Linear(2 * d, 2 * d)
        self.mix = nn.Linear(2 * d, d)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.vocab_size)

    def forward(self, states: Tensor, pattern: ActivationPattern) -> Tensor:
        """Args: states (B, K, D); pattern of K slots. Returns: logits (B, V). Gradients: states, gates, parameters."""
        return self.head(self.features(states, pattern))

    def features(self, states: Tensor, pattern: ActivationPattern) -> Tensor:
        """(B, D): the settled pattern as one vector, what the head, or a head of your own, reads."""
        gate, table, idx = pattern.gate, self.readout, pattern.idx
        sharded = isinstance(table, ShardedTable)
        if sharded or (self.config.active_groups and torch.is_grad_enabled() and table.requires_grad):
            used = torch.where(pattern.valid(), idx, idx[:, :1])  # padding must not count as neuron 0
            neuron, idx = used.unique(return_inverse=True)  # on a GPU this waits for their number
            table = sparse_rows(table, neuron)
        read = bio_kernels.weighted_rows(table, idx, gate, backend=self.config.backend)
        total = gate.sum(1, keepdim=True).clamp(min=torch.finfo(gate.dtype).tiny)
        mean = ((gate / total).unsqueeze(1) @ states).squeeze(1)
        held = self._attend(mean, states, pattern)
        return self.norm(mean + self.mix(F.gelu(self.join(torch.cat([read, held], 1)))))

    def _attend(self, mean: Tensor, states: Tensor, pattern: ActivationPattern) -> Tensor:
        """(B, D): what the mean asks of the active neurons."""
        heads = self.config.n_heads
        query = self.query(self.state_norm(mean)).unflatten(-1, (heads, 1, -1))  # (B, H, 1, D / H)
        key, value = self.kv(self.state_norm(states)).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        bias = pattern.gate.clamp(min=1e-30).log().masked_fill(~pattern.valid(), float("-inf"))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[:, None, None]).flatten(1)

    def extra_repr(self) -> str:
        return f"n_neurons={self.config.n_neurons}, vocab_size={self.config.vocab_size}"
