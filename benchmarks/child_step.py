"""A child process that makes one SPROUT training step and prints how far its memory rose, and how long it took.

``python -m benchmarks.child_step backend batch steps``; see test_sprout.py.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from sprout import BrainLikeSprout, SproutConfig

from . import memory


def train_step(model: BrainLikeSprout, tokens: Tensor) -> float:
    """Forward, backward and plain gradient descent; the loss."""
    loss = torch.nn.functional.cross_entropy(model(tokens), tokens[:, -1])
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return float(loss)


def main(backend: str, batch: str, steps: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_interaction_steps": int(steps), "final_sparsity": 128, "backend": backend}
    tokens = torch.randint(256, (int(batch), 64))
    small: dict[str, Any] = sizes | {"n_neurons": 128, "recruits_per_step": 4}
    # a small model first: threads, code and libraries' buffers are not what is measured
    train_step(BrainLikeSprout(SproutConfig(**small)), tokens)
    model = BrainLikeSprout(SproutConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)  # every page of them is in use before
    before = memory.resident_peak(reset=True)
    start = time.perf_counter()
    train_step(model, tokens)
    seconds = time.perf_counter() - start
    print(json.dumps({"before": before, "rise": memory.resident_peak() - before, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
