"""A child process that trains a SPROUT in groups for some steps and prints what a step takes, and its peak memory.

``python -m benchmarks.child_scaling n_neurons d_state active_groups steps``; see test_scaling.py.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from sprout import BrainLikeSprout, SproutConfig, data
from sprout.sparse_gradients import clip_grad_norm_, sparse_tables

from . import memory

BATCH, WINDOW = 4, 64
SIZES: dict[str, Any] = {"initial_sparsity": 128, "final_sparsity": 256, "n_interaction_steps": 5}
SIZES |= {"connection": "block_sparse", "blocks_per_row": 8, "block_size": 32}
WARM = 2  # steps: the first makes the states of the optimizers


class Training:
    """A model and its optimizers: AdamW, and SparseAdam for the tables of the neurons."""

    def __init__(self, n_neurons: int, d_state: int, active_groups: int) -> None:
        sizes: dict[str, Any] = SIZES | {"n_neurons": n_neurons, "d_state": d_state, "active_groups": active_groups}
        self.model = BrainLikeSprout(SproutConfig(**sizes))
        tables = sparse_tables(self.model)
        dense = [p for name, p in self.model.named_parameters() if name not in tables]
        sparse = [p for name, p in self.model.named_parameters() if name in tables]
        self.optimizers = [torch.optim.AdamW(dense, fused=True), torch.optim.SparseAdam(sparse)]

    def step(self, tokens: Tensor) -> float:
        """Forward, backward, clipping, both optimizers, Hebbian plasticity; seconds."""
        start = time.perf_counter()
        settled = self.model.settle(tokens)
        logits = self.model.decoder(settled.states, settled.history[-1])
        torch.nn.functional.cross_entropy(logits, tokens[:, 0]).backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.model.plasticity(settled.history, eta=1e-3)
        return time.perf_counter() - start

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> float:
        """Seconds of one forward, without gradient."""
        start = time.perf_counter()
        self.model(tokens)
        return time.perf_counter() - start


def main(n_neurons: str, d_state: str, active_groups: str, steps: str) -> None:
    torch.manual_seed(0)
    training = Training(int(n_neurons), int(d_state), int(active_groups))
    made = memory.resident_peak()
    windows = data.batches(data.encode(data.corpus()), batch_size=BATCH, window=WINDOW, seed=0)
    texts = [next(windows) for _ in range(WARM + int(steps))]
    taken = [training.step(text) for text in texts][WARM:]
    forward = [training.forward(text) for text in texts][WARM:]
    figures = {"n": int(n_neurons), "parameters": sum(p.numel() for p in training.model.parameters())}
    figures |= {"step_s": statistics.median(taken), "forward_s": statistics.median(forward)}
    figures |= {"tokens_per_s": BATCH * WINDOW / figures["step_s"]}
    print(json.dumps(figures | {"made_bytes": made, "peak_bytes": memory.resident_peak()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
