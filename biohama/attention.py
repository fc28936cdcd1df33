"""Attention among a few nodes of which only the most salient send."""

from __future__ import annotations

import bio_kernels
import torch
from torch import Tensor, nn


class SparseAttention(nn.Module):
    """nodes (B, M, D) -> messages (B, M, D): every node listens, the n_senders most salient of each sample speak.

    salience_m = a . node_m + b_m;  gate = sigmoid(salience) of the n_senders highest, 0 of the others
    message_i  = W_o sum_j gate_j exp(q_i . k_j / sqrt(D / H) + strength[j, i]) v_j / sum_j gate_j exp(...)
    Which nodes send is a decision without gradient; how much is not. So in training Gumbel noise may let others send
    now and then (Kool et al. 2019): a node that never sends cannot learn that it is needed. The choice is
    bio_kernels.topk_gather, the messages are bio_kernels.sparse_attention with a learned strength[sender, receiver].

    Args: n_nodes, M; d_node, D, a multiple of n_heads; n_senders in 1..M; backend, see bio_kernels.
    """

    def __init__(self, n_nodes: int, d_node: int, n_senders: int, n_heads: int = 1, backend: str = "auto") -> None:
        super().__init__()
        if not 1 <= n_senders <= n_nodes:
            raise ValueError(f"n_senders must be in 1..n_nodes={n_nodes}, got {n_senders}")
        if d_node % n_heads:
            raise ValueError(f"d_node must be a multiple of n_heads={n_heads}, got {d_node}")
        self.n_nodes, self.n_senders, self.n_heads, self.backend = n_nodes, n_senders, n_heads, backend
        self.salience = nn.Linear(d_node, 1, bias=False)
        self.salience_bias = nn.Parameter(torch.zeros(n_nodes))
        self.qkv = nn.Linear(d_node, 3 * d_node, bias=False)
        self.out = nn.Linear(d_node, d_node, bias=False)
        self.strength = nn.Parameter(torch.zeros(n_nodes, n_nodes))

    def gates(self, nodes: Tensor, noise: float = 0.0) -> Tensor:
        """(B, M): how much each of nodes (B, M, D) sends, 0 for all but n_senders of a sample; noise as ``forward``."""
        score = self.salience(nodes).squeeze(-1) + self.salience_bias
        rank = score.detach()
        if noise > 0:
            rank = rank - noise * torch.empty_like(rank).exponential_().clamp(min=1e-9).log()
        top = bio_kernels.topk_gather(rank, nodes, self.n_senders, backend=self.backend)
        return torch.zeros_like(score).scatter(1, top.idx, score.gather(1, top.idx).sigmoid())

    def forward(self, nodes: Tensor, noise: float = 0.0) -> Tensor:
        """Messages (B, M, D) of nodes (B, M, D).

        noise >= 0: of the salience by which senders are chosen, for training, in its units. Raises: ValueError for
        another M. Gradients: nodes, parameters.
        """
        if nodes.dim() != 3 or nodes.shape[1] != self.n_nodes:
            raise ValueError(f"nodes must be (B, n_nodes={self.n_nodes}, D), got {tuple(nodes.shape)}")
        everyone = torch.arange(self.n_nodes, device=nodes.device).expand(len(nodes), -1)
        q, k, v = self.qkv(nodes).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        gate = self.gates(nodes, noise)
        found = bio_kernels.sparse_attention(q, k, v, everyone, self.strength, gate=gate, backend=self.backend)
        return self.out(found.transpose(1, 2).flatten(2))
