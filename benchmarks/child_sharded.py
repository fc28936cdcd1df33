"""Training steps of a pool that is spread over processes: what each process holds, and what a step takes.

``torchrun --standalone --nproc-per-node 2 -m benchmarks.child_sharded n_neurons d_state active_groups steps``, with
``python -m`` instead of torchrun for one process. Each prints a line of JSON. A step is that of child_scaling.py on the
same BATCH windows, of which each process takes its share.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sprout import BrainLikeSprout, SproutConfig, data
from sprout.sharded_pool import shard_, sharded_tables
from sprout.sparse_gradients import clip_grad_norm_, sparse_tables
from sprout.train_metrics import Learner

from . import memory
from .child_scaling import BATCH, SIZES, WARM, WINDOW


class Turn(Learner):
    """tokens (B, T) -> (loss of their continuation, patterns), through DistributedDataParallel's forward."""

    def forward(self, tokens: Tensor) -> Any:
        settled = self.model.settle(tokens)  # type: ignore[operator]
        logits = self.model.decoder(settled.states, settled.history[-1])  # type: ignore[operator]
        return torch.nn.functional.cross_entropy(logits, tokens[:, 0]), settled.history


def step(
    model: BrainLikeSprout, turn: torch.nn.Module, optimizers: list[torch.optim.Optimizer], tokens: Tensor
) -> float:
    """Forward, backward, clipping, both optimizers, Hebbian plasticity; seconds."""
    start = time.perf_counter()
    loss, history = turn(tokens)
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0, tables=list(sharded_tables(model).values()))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    model.plasticity(history, eta=1e-3)
    return time.perf_counter() - start


def main(n_neurons: str, d_state: str, active_groups: str, steps: str) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES | {
        "n_neurons": int(n_neurons),
        "d_state": int(d_state),
        "active_groups": int(active_groups),
    }
    model = BrainLikeSprout(SproutConfig(**sizes))
    shard_(model)
    names = sparse_tables(model)
    dense = [p for name, p in model.named_parameters() if name not in names]
    sparse = [p for name, p in model.named_parameters() if name in names]
    optimizers = [torch.optim.AdamW(dense, fused=True), torch.optim.SparseAdam(sparse)]
    turn = Turn(model)
    learner = torch.nn.parallel.DistributedDataParallel(turn) if world > 1 else turn
    memory.resident_peak(reset=True)  # of the steps: at the start each process makes the whole model
    windows = data.batches(data.encode(data.corpus()), batch_size=BATCH, window=WINDOW, seed=0)
    shares = [next(windows).chunk(world)[rank] for _ in range(WARM + int(steps))]
    taken = [step(model, learner, optimizers, share) for share in shares][WARM:]
    states = [x for state in optimizers[1].state.values() for x in state.values() if isinstance(x, Tensor)]
    figures = {"processes": world, "rank": rank, "table_bytes": sum(p.nbytes for p in sparse)}
    figures |= {"state_bytes": sum(x.nbytes for x in states), "peak_bytes": memory.resident_peak()}
    print(json.dumps(figures | {"step_s": statistics.median(taken)}), flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
