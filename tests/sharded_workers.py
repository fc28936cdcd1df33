"""What each of several processes does for tests/test_sharded_pool.py: it computes, and asserts nothing."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sprout import sharded_state
from sprout.distributed import gather
from sprout.sharded import ShardedTable
from sprout.sharded_pool import absent, leave_to_owners, shard_, sharded_tables
from sprout.sharded_state import (
    gathered,
    load_weights,
    optimizer_outline,
    outline,
    own_optimizer_state,
    whole_optimizer_state,
    whole_weights,
)
from sprout.sparse_gradients import clip_grad_norm_
from sprout.train_config import TrainConfig
from sprout.train_metrics import Learner, evaluate
from sprout.trainer import make_optimizers
from tests.distributed_workers import BATCHES, refusal, some_history
from tests.sprout_models import small, some_tokens, wired

GROUPED = dict(n_neurons=208, connection="block_sparse", block_size=16, blocks_per_row=3, active_groups=3)
N, STEPS, CLIP = 208, 4, 0.5
SAMPLES = {"together": (2, 2, 2, 2), "absent": (3, 0, 1, 2)}  # of each process


def grouped(dtype=torch.float64, **changes):
    """A model with connections that matter, the same in every process."""
    return wired(small(**{**GROUPED, **changes})).to(dtype)


def batches(step, kind, world):
    """The windows of each process."""
    sizes = SAMPLES[kind][:world]
    return some_tokens(sum(sizes), 5, seed=step).split(sizes)


class Turn(Learner):
    """The share of a process in the mean over all samples; of one without samples, 0."""

    def forward(self, tokens, share):  # type: ignore[override]
        if not len(tokens):
            return absent(self.model), []
        result = super().forward(tokens)
        return result.loss * share, result.history


def optimizers(model, kind):
    """As training has them; or gradient descent, which unlike Adam's sees how large a gradient is."""
    if kind == "adam":
        return make_optimizers(model, TrainConfig(lr=0.01))
    return [torch.optim.SGD(model.parameters(), lr=0.5)]


def steps(model, learner, optimize, part, first=0, n=STEPS, tables=(), hebb=None):
    """Trains n steps; part(step) are the windows and their share of the loss. Returns: [(loss, norm)]."""
    told = []
    for step in range(first, first + n):
        loss, history = learner(*part(step))
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), CLIP, tables=tables)
        for optimizer in optimize:
            optimizer.step()
            optimizer.zero_grad()
        model.plasticity(history, eta=0.1, decay=1.0, process_group=hebb)
        told.append((loss.detach(), norm))
    return told


def learnt_alone(world, kind, optimizer, model=None, **how):
    """(losses and norms, weights, states) of one process with the samples of all."""
    model = grouped() if model is None else model
    optimize = optimizers(model, optimizer)

    def part(step):
        return torch.cat(batches(step, kind, world)), 1.0

    told = steps(model, Turn(model, settling=0.1), optimize, part, hebb="local", **how)
    return told, model.state_dict(), [x.state_dict() for x in optimize]


def learnt(rank, world, kind, optimizer, model=None, **how):
    """The same of a process among others."""
    model = grouped() if model is None else model
    shard_(model)
    optimize = optimizers(model, optimizer)
    unused = not model.config.n_interaction_steps
    learner = DistributedDataParallel(Turn(model, settling=0.1), find_unused_parameters=unused)

    def part(step):
        own = batches(step, kind, world)
        return own[rank], len(own[rank]) * world / sum(map(len, own))

    told = steps(model, learner, optimize, part, tables=list(sharded_tables(model).values()), **how)
    told = [(torch.stack(gather(loss, dist.group.WORLD)).mean(), norm) for loss, norm in told]
    return told, whole_weights(model), [whole_optimizer_state(x, model) for x in optimize]


def held(rank, world):
    """Elements of each table here, and the shape of every tensor whose memory is as large as that of a whole table.

    After steps, and after weights and optimizer states have been loaded, which cross in pieces of seven rows.
    """
    with patch.object(sharded_state, "ROWS_AT_ONCE", 7):
        return _held(rank, world)


def _held(rank, world):
    model = grouped()
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    told, weights, states = learnt(rank, world, "together", "adam", model)
    own = {name: table.local.numel() for name, table in sharded_tables(model).items()}
    optimize = optimizers(model, "adam")
    restore(model, optimize, (weights, states))
    again = whole_weights(model)
    kept = all(torch.equal(x, again[name]) for name, x in weights.items())
    del told, weights, states, again
    gc.collect()
    whole = {sizes[name] for name in own} - {sizes["pool.threshold"]}  # which is that of the groups' signatures
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    tensors += [x for state in optimize[-1].state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return own, [tuple(x.shape) for x in tensors if x.untyped_storage().nbytes() in whole], len(tensors), kept


def together(rank, world):
    return {kind: learnt(rank, world, "together", kind) for kind in ("adam", "sgd")}


def one_without_samples(rank, world):
    """The second process has none; weights only of the first."""
    return learnt(rank, world, "absent", "adam")


def without_interaction(rank, world):
    """No synapse is used, and nobody sends a gradient of one."""
    return learnt(rank, world, "absent", "adam", grouped(n_interaction_steps=0))


def faulty(rank, world):
    """Negative controls: gradients of the sum; those of other processes left out; the norm of the rows here alone."""
    rows, clip = ShardedTable.rows, clip_grad_norm_

    def kept(self, index, mean=False, also=None):
        found = rows(self, index, mean=mean, also=also)
        here = (index >= self.first) & (index < self.first + len(self.local))
        return torch.where(here.view(-1, *[1] * (found.dim() - 1)), found, found.detach())

    faults = {
        "sum": patch.object(
            ShardedTable, "rows", lambda self, index, mean=False, also=None: rows(self, index, also=also)
        ),
        "own": patch.object(ShardedTable, "rows", kept),
        "norm": patch(f"{__name__}.clip_grad_norm_", lambda parameters, limit, tables: clip(parameters, limit)),
    }
    found = {}
    for name, fault in faults.items():
        with fault:
            found[name] = learnt(rank, world, "together", "sgd")
    return found


def plasticity(rank, world):
    """Weights after the rule, of every dtype and decay, the second process being without samples."""
    found = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for decay in (0.0, 1.0):
            model = grouped(dtype)
            shard_(model)
            history = some_history(BATCHES[rank], seed=rank, n=N)
            model.plasticity([p._replace(gate=p.gate.to(dtype)) for p in history], eta=0.4, decay=decay, bound=0.5)
            found[dtype, decay] = whole_weights(model)
    return found


def forward(rank, world):
    """Logits of the whole and of the spread model, generated tokens, an evaluation with an uneven share of batches."""
    model, tokens = grouped().eval(), some_tokens(2, 5, seed=rank)
    whole = grouped().eval()
    shard_(model)
    with torch.no_grad():
        logits = model(tokens), whole(tokens)
    drawn = [x.generate(tokens, 3, seed=rank) for x in (model, whole)]
    state = torch.random.get_rng_state()
    copy = gathered(model)
    same_numbers = torch.equal(state, torch.random.get_rng_state())
    accelerator = SimpleNamespace(
        process_index=rank,
        num_processes=world,
        device=torch.device("cpu"),
        autocast=nullcontext,
        reduce=lambda x, _: torch.stack(gather(x, dist.group.WORLD)).sum(0),
        gather=lambda x: torch.cat(gather(x, dist.group.WORLD)),
    )
    texts = [some_tokens(2, 6, seed=i) for i in range(world + 1)]
    figures = evaluate(Learner(model), iter(texts), 2, accelerator), evaluate(Learner(model), iter([]), 2, accelerator)
    return logits, drawn, figures, None if copy is None else (copy(tokens), copy.training), same_numbers


def goes_on(rank, world):
    """What eight steps learn, the first four by these processes and by one, handed on as a checkpoint does."""
    model = grouped()
    _, weights, states = learnt(rank, world, "together", "adam", model)
    results = [continued(rank, world, grouped(), (weights, states))]
    _, weights, states = learnt_alone(world, "together", "adam")
    results.append(continued(rank, world, grouped(), (weights, states)))
    return results


def restore(model, optimize, saved):
    """Loads the first process's weights and states of whole tables."""
    weights, states = saved
    told = [None]
    if dist.get_rank() == 0:
        parts = zip(optimize, states, strict=True)
        told = [(outline(model, weights), [optimizer_outline(x, model, state) for x, state in parts])]
    dist.broadcast_object_list(told)
    weights, states = saved if dist.get_rank() == 0 else told[0]
    load_weights(model, weights, "a checkpoint")
    for optimizer, state in zip(optimize, states, strict=True):
        optimizer.load_state_dict(own_optimizer_state(optimizer, model, state))


def continued(rank, world, model, saved):
    """Four steps more."""
    shard_(model)
    optimize = optimizers(model, "adam")
    restore(model, optimize, saved)
    learner = DistributedDataParallel(Turn(model, settling=0.1))
    steps(
        model,
        learner,
        optimize,
        lambda step: (batches(step, "together", world)[rank], 1.0),
        first=STEPS,
        tables=list(sharded_tables(model).values()),
    )
    return whole_weights(model)


def wrapped(rank, world):
    """Whether each process keeps its rows when what is wrapped holds the model."""
    model = grouped()
    shard_(model)
    own = [table.local.detach().clone() for table in sharded_tables(model).values()]
    holder = torch.nn.ModuleDict({"inner": model})
    leave_to_owners(holder)
    DistributedDataParallel(holder)  # else refuses blocks that are 20 here and 19 there, and copies the others
    now = [table.local for table in sharded_tables(model).values()]
    return all(torch.equal(*pair) for pair in zip(own, now, strict=True))


def refused(rank, world):
    """What a spread pool cannot do, and models that do not fit."""
    last, model = rank == world - 1, grouped()
    told = {
        "seed": refusal(lambda: shard_(wired(small(seed=rank, **GROUPED)))),
        "flat": refusal(lambda: shard_(grouped(active_groups=0) if last else grouped())),
        "other": refusal(lambda: shard_(torch.nn.Linear(2, 2))),  # type: ignore[arg-type]
    }
    unchanged = not sharded_tables(model)
    shard_(model)
    other = dist.new_group(list(range(world)))
    history = some_history(1, seed=0, n=N)
    told |= {
        "twice": refusal(lambda: shard_(model)),
        "grow": refusal(lambda: model.grow(16)),
        "prune": refusal(lambda: model.prune(torch.arange(16))),
        "rewire": refusal(lambda: model.rewire(history)),
        "waken": refusal(lambda: model.pool.waken(torch.ones(N, dtype=torch.bool), rate=0.1)),
        "score": refusal(lambda: model.pool.score(torch.zeros(1, 16, dtype=torch.float64))),
        "save": refusal(lambda: model.save_pretrained("nowhere")),
        "local": refusal(lambda: model.plasticity(history, eta=0.1, process_group="local")),
        "group": refusal(lambda: model.plasticity(history, eta=0.1, process_group=other)),
        "weights": refusal(lambda: load_weights(model, grouped(n_neurons=192).state_dict(), "a checkpoint")),
        "missing": refusal(lambda: load_weights(model, {}, "a checkpoint")),
    }
    return told, unchanged, torch.equal(model.pool.threshold.full(), grouped().pool.threshold)
