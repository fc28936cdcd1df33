"""Which modules are listened to."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """nodes (..., M, D) -> router weights (..., M), >= 0 and summing to 1 over the modules.

    logit_m = u_m . node_m + b_m;  p = softmax(logit);  r = p [p >= threshold or strongest] / sum of the same
    """

    def __init__(self, n_modules: int, d_node: int, threshold: float = 0.1) -> None:
        super().__init__()
        self.threshold = threshold
        self.weight = nn.Parameter(torch.randn(n_modules, d_node) * d_node**-0.5)
        self.bias = nn.Parameter(torch.zeros(n_modules))

    def logits(self, nodes: Tensor) -> Tensor:
        """(..., M), before softmax and threshold."""
        if nodes.shape[-2:] != self.weight.shape:
            raise ValueError(f"nodes must be (..., M, D) = (..., {tuple(self.weight.shape)}), got {tuple(nodes.shape)}")
        return (nodes * self.weight).sum(-1) + self.bias

    def forward(self, nodes: Tensor, *, threshold: float | None = None, floor: float = 0.0) -> Tensor:
        """Router weights.

        Args: nodes (..., M, D); threshold instead of the router's own; floor in 0..1, the share that is spread evenly
            over all modules (for training).
        Raises: ValueError for a wrong shape. Gradients: nodes, parameters.
        """
        return self.choose(self.logits(nodes), self.threshold if threshold is None else threshold, floor)

    @staticmethod
    def choose(logits: Tensor, threshold: float, floor: float = 0.0) -> Tensor:
        """Weights (..., M) of logits (..., M), of which -inf are never chosen."""
        p = logits.softmax(-1)
        if threshold > 0:
            strongest = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
            kept = p * ((p >= threshold) | (strongest > 0))
            p = kept / kept.sum(-1, keepdim=True)
        if floor > 0:
            open_ = torch.isfinite(logits)
            p = (1 - floor) * p + floor * open_ / open_.sum(-1, keepdim=True)
        return p
