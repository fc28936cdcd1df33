"""Rounds of messages among the nodes: how token and executive state reach the router and the gates."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import SparseAttention


class MessagePassing(nn.Module):
    """nodes (B, M, D) -> nodes (B, M, D) after n_rounds of sparse messages; one set of weights for every round.

    node <- LayerNorm(node + SparseAttention(nodes));  node <- LayerNorm(node + W_2 gelu(W_1 node))
    """

    def __init__(
        self,
        n_nodes: int,
        d_node: int,
        n_senders: int,
        n_rounds: int = 1,
        n_heads: int = 1,
        backend: str = "auto",
        always: int = 0,
    ) -> None:
        super().__init__()
        self.n_rounds = n_rounds
        self.attention = SparseAttention(n_nodes, d_node, n_senders, n_heads, backend, always)
        self.expand = nn.Linear(d_node, 2 * d_node)
        self.contract = nn.Linear(2 * d_node, d_node)
        self.norms = nn.ModuleList(nn.LayerNorm(d_node) for _ in range(2))

    def forward(self, nodes: Tensor) -> Tensor:
        """nodes (B, M, D) -> (B, M, D); errors as ``SparseAttention``. Gradients: nodes, parameters."""
        for _ in range(self.n_rounds):
            nodes = self.norms[0](nodes + self.attention(nodes))
            nodes = self.norms[1](nodes + self.contract(F.gelu(self.expand(nodes))))
        return nodes

    def extra_repr(self) -> str:
        return f"n_rounds={self.n_rounds}"
