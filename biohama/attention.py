"""Attention among a few nodes of which a few send."""

from __future__ import annotations

import bio_kernels
import torch
from torch import Tensor, nn


class SparseAttention(nn.Module):
    """nodes (B, M, D) -> messages (B, M, D): every node listens, n_senders of each sample speak.

    salience_m = a . node_m + b_m;  gate = sigmoid(salience) of the senders, 0 of the others
    message_i  = W_o sum_j gate_j exp(q_i . k_j / sqrt(D / H) + strength[j, i]) v_j / sum_j gate_j exp(...)
    The first ``always`` nodes send in every sample; the rest of the senders are the most salient of the other nodes.
    Which nodes send is a decision without gradient, and one that does not send learns nothing: what everything hangs
    on must not have to compete. The choice is bio_kernels.topk_gather, the messages are bio_kernels.sparse_attention
    with a learned strength[sender, receiver].

    Args: n_nodes, M; d_node, D, a multiple of n_heads; n_senders in 1..M; backend, see bio_kernels; always in
        0..n_senders.
    """

    def __init__(
        self, n_nodes: int, d_node: int, n_senders: int, n_heads: int = 1, backend: str = "auto", always: int = 0
    ) -> None:
        super().__init__()
        if not 1 <= n_senders <= n_nodes:
            raise ValueError(f"n_senders must be in 1..n_nodes={n_nodes}, got {n_senders}")
        if not 0 <= always <= n_senders:
            raise ValueError(f"always must be in 0..n_senders={n_senders}, got {always}")
        if d_node % n_heads:
            raise ValueError(f"d_node must be a multiple of n_heads={n_heads}, got {d_node}")
        self.n_nodes, self.n_senders, self.n_heads, self.backend = n_nodes, n_senders, n_heads, backend
        self.always = always
        self.salience = nn.Linear(d_node, 1, bias=False)
        self.salience_bias = nn.Parameter(torch.zeros(n_nodes))
        self.qkv = nn.Linear(d_node, 3 * d_node, bias=False)
        self.out = nn.Linear(d_node, d_node, bias=False)
        self.strength = nn.Parameter(torch.zeros(n_nodes, n_nodes))

    def gates(self, nodes: Tensor) -> Tensor:
        """(B, M): how much each of nodes (B, M, D) sends, 0 for all but n_senders of a sample."""
        score = self.salience(nodes).squeeze(-1) + self.salience_bias
        first = torch.arange(self.n_nodes, device=nodes.device) < self.always
        rank = score.detach().masked_fill(first, torch.finfo(score.dtype).max)
        top = bio_kernels.topk_gather(rank, nodes, self.n_senders, backend=self.backend)
        return torch.zeros_like(score).scatter(1, top.idx, score.gather(1, top.idx).sigmoid())

    def forward(self, nodes: Tensor) -> Tensor:
        """Messages (B, M, D) of nodes (B, M, D). Raises: ValueError for another M. Gradients: nodes, parameters."""
        if nodes.dim() != 3 or nodes.shape[1] != self.n_nodes:
            raise ValueError(f"nodes must be (B, n_nodes={self.n_nodes}, D), got {tuple(nodes.shape)}")
        everyone = torch.arange(self.n_nodes, device=nodes.device).expand(len(nodes), -1)
        q, k, v = self.qkv(nodes).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        gate = self.gates(nodes)
        found = bio_kernels.sparse_attention(q, k, v, everyone, self.strength, gate=gate, backend=self.backend)
        return self.out(found.transpose(1, 2).flatten(2))
