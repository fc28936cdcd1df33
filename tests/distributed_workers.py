"""What each of several processes does for tests/test_distributed.py: it computes, and asserts nothing.

Every scenario is a function (rank, world, *arguments) -> tree of tensors and values; ``run`` starts the processes.
"""

from __future__ import annotations

import time
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bio_kernels import BlockSparse

from sprout import ActivationPattern
from sprout.sharded import ShardedTable, sharded_topk
from tests.sprout_models import small, wired

TIMEOUT = 240.0  # seconds for the processes to start and do all their scenarios
N, K = 96, 20  # of tests.sprout_models
STRENGTHS = {
    "dense": {},
    "block_sparse": {"connection": "block_sparse", "block_size": 16, "blocks_per_row": 3},
    "float64": {},
}
BATCHES = (3, 0, 2, 4)  # samples of each process
ROWS, WIDTH = 11, 3  # of a sharded table: 6 and 5, or 3, 3, 3 and 2 rows


def run(scenarios, world, folder: Path, *arguments):
    """What each scenario gave on each process: {name: [of rank 0, of rank 1, ...]}. Ends them all after TIMEOUT."""
    context = mp.spawn(work, (world, str(folder), scenarios, arguments), nprocs=world, join=False)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{world} processes did not end in {TIMEOUT:.0f} s")
    finally:
        for process in context.processes:
            process.kill()
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [own[name] for own in found] for name in found[0]}


def work(rank, world, folder, scenarios, arguments):
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    torch.save({scenario.__name__: scenario(rank, world, *arguments) for scenario in scenarios}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def refusal(call):
    """What a call is refused with."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# ------------------------------------------------------------------------------------------------- plasticity


def some_history(batch, seed, steps=2, slots=K, n=N):
    """Patterns of random neurons, of different counts."""
    g = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(steps):
        idx = torch.stack([torch.randperm(n, generator=g)[:slots] for _ in range(batch)] or [torch.zeros(0, slots)])
        idx = (idx if batch else idx.flatten(0, 1)[:0].view(0, slots)).long().sort(1).values
        count = torch.randint(1, slots + 1, (batch,), generator=g)
        valid = torch.arange(slots) < count[:, None]
        gate = torch.rand(batch, slots, generator=g)
        history.append(ActivationPattern(idx.where(valid, 0), gate.where(valid, 0), count, n))
    return history


def joined(histories):
    """The histories of processes as one, samples in order of rank."""
    steps = zip(*histories, strict=True)
    return [ActivationPattern(*(torch.cat([p[i] for p in step]) for i in range(3)), N) for step in steps]


def fresh(kind):
    """A model with connections that matter, the same in every process."""
    model = wired(small(**STRENGTHS[kind]))
    return model.double() if kind == "float64" else model


def strength(model):
    """The numbers of its connections."""
    held = model.pool.connection_strength
    return (held.blocks if isinstance(held, BlockSparse) else held).detach().clone()


def cast(history, kind):
    return [p._replace(gate=p.gate.double()) for p in history] if kind == "float64" else history


def learned(kind, decay, history, **how):
    """Strengths after two updates."""
    model = fresh(kind)
    for _ in range(2):
        model.plasticity(cast(history, kind), eta=0.4, decay=decay, bound=0.5, **how)
    return strength(model)


def plasticity(rank, world):
    own = some_history(BATCHES[rank], seed=rank)
    return {(kind, decay): learned(kind, decay, own) for kind in STRENGTHS for decay in (0.0, 1.0)}


def plasticity_without_samples(rank, world):
    """The process that has none passes no patterns at all; then one has fewer slots; then nobody has samples."""
    nothing = learned("dense", 1.0, [] if BATCHES[rank] == 0 else some_history(BATCHES[rank], seed=rank))
    narrow = learned("dense", 1.0, some_history(2, seed=rank, slots=K - 5 * rank))
    return nothing, narrow, learned("float64", 1.0, some_history(0, seed=0))


def plasticity_apart(rank, world):
    """The negative control: each process for itself, and a group of its own."""
    alone = [dist.new_group([r]) for r in range(world)][rank]
    own = some_history(2, seed=rank)
    return learned("dense", 0.0, own, process_group="local"), learned("dense", 0.0, own, process_group=alone)


def plasticity_refused(rank, world):
    """One process's mistake is told on all of them, and the next call works."""
    model, last = fresh("dense"), rank == world - 1
    other = dist.new_group([0])
    right = some_history(2, seed=rank)
    wrong = {
        "pool": some_history(2, seed=0, n=50) if last else right,
        "length": right[:1] if last else right,
        "batches": [*some_history(1, seed=0, steps=1), *some_history(2, seed=0, steps=1)] if last else right,
        "empty": [],
    }
    told = {name: refusal(lambda h=history: model.plasticity(h, eta=0.1)) for name, history in wrong.items()}
    if last:
        told["group"] = refusal(lambda: model.plasticity(right, eta=0.1, process_group=other))
    told["type"] = refusal(lambda: model.plasticity(right, eta=0.1, process_group="locals"))
    unchanged = torch.equal(strength(model), strength(fresh("dense")))
    model.plasticity(right, eta=0.1)
    return told, unchanged, strength(model)


def wrapped(rank, world):
    """Weights that differ before DistributedDataParallel and not after, also when the rule has been applied."""
    model = wired(small(seed=rank), seed=rank)
    before = strength(model)
    torch.nn.parallel.DistributedDataParallel(model)
    after = strength(model)
    model.plasticity(some_history(2, seed=rank), eta=0.1)
    return before, after, strength(model)


# ------------------------------------------------------------------------------------------------- sharded table


def whole_table(dtype=torch.float32):
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)


def asked(rank, step):
    """Rows that a process asks for: overlapping ones, other owners' only, none."""
    choices = [[0, 2, 5, 6, 10], [], [0, 1, 2], [2, 10], list(range(ROWS)), [7]]
    return torch.tensor(choices[(rank + 2 * step) % len(choices)], dtype=torch.int64)


def loss_of(rows, rank, step):
    """A different one for each process and row."""
    weight = torch.linspace(0.1, 1.0, rows.numel(), dtype=rows.dtype).view_as(rows)
    return ((rows - rank).square() * weight).sum() * (1 + step)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adam": lambda p: torch.optim.SparseAdam(p, lr=0.05),
}


def table_steps(rank, world, optimizer):
    """The whole table after three steps, with two uses of the table in the second; what was asked for, on the way."""
    table = ShardedTable(ROWS, WIDTH)
    table.load_full_(whole_table())
    optimize = OPTIMIZERS[optimizer]([table.local])
    seen, touched = [], []
    for step in range(3):
        optimize.zero_grad()
        rows = table.rows(asked(rank, step))
        seen.append(rows.detach())
        loss = loss_of(rows, rank, step)
        if step == 1:
            loss = loss + loss_of(table.rows(asked(rank, 0)), rank, 0)
        loss.backward()
        grad = table.local.grad
        touched.append((grad.is_sparse, (grad.coalesce().indices()[0] + table.first).tolist()))
        optimize.step()
    return {"full": table.full(), "seen": seen, "touched": touched, "rows": len(table.local)}


def table_sgd(rank, world):
    return table_steps(rank, world, "sgd")


def table_adam(rank, world):
    return table_steps(rank, world, "adam")


def table_dtypes(rank, world):
    """Rows and gradients in every dtype; without gradient; after a wrong index on one process."""
    found = {}
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        table = ShardedTable(ROWS, WIDTH, dtype=dtype)
        table.load_full_(whole_table(dtype))
        rows = table.rows(asked(rank, 0))
        rows.sum().backward()
        grad = torch.zeros(ROWS, WIDTH, dtype=dtype)
        grad[table.first : table.first + len(table.local)] = table.local.grad.to_dense()
        found[dtype] = rows.detach(), grad
    last = rank == world - 1
    wrong = {
        "ascending": torch.tensor([1, 1]),
        "range": torch.tensor([ROWS]),
        "dtype": torch.tensor([1.0]),
        "type": [1],
    }
    right = asked(rank, 0)
    told = {name: refusal(lambda i=index: table.rows(i if last else right)) for name, index in wrong.items()}
    with torch.no_grad():
        again = table.rows(right)
    return found, told, again, tuple(ShardedTable(1, 2).full().shape), ShardedTable(3, 1, process_group="local").full()


def table_saved(rank, world, folder):
    """Writes a table with torch.distributed.checkpoint."""
    table = ShardedTable(ROWS, WIDTH)
    table.load_full_(whole_table())
    checkpoint().save({"table": table.dtensor()}, checkpoint_id=folder)


def table_loaded(rank, world, folder):
    """Reads it, with any number of processes."""
    table = ShardedTable(ROWS, WIDTH)
    checkpoint().load({"table": table.dtensor()}, checkpoint_id=folder)
    return table.full()


def checkpoint():
    import torch.distributed.checkpoint as dcp

    return dcp


# ------------------------------------------------------------------------------------------------- sharded top-k

SCORED = {2: [(7, 6), (0, 13)], 4: [(5, 0, 1, 7), (4, 4, 4, 1)]}  # neurons of each process, 13 in all


def scores(dtype=torch.float32):
    """(B, 13) with ties, zeros of both signs, infinities and NaN."""
    score = torch.randn(6, 13, generator=torch.Generator().manual_seed(5)).mul(2).round().div(2).to(dtype)
    score[1] = 0.0
    score[1, ::3] = -0.0
    score[2, :] = -torch.inf
    score[3, [2, 9]] = torch.nan
    score[4, [4, 12]] = torch.inf
    return score


TOPKS = [(torch.float32, 1), (torch.float32, 5), (torch.float32, 13), (torch.float64, 4), (torch.bfloat16, 8)]


def topk(rank, world):
    """The result for each split and each of TOPKS; gradients, each process having its loss; no batch; refusals."""
    results = []
    for sizes, (dtype, k) in product(SCORED[world], TOPKS):
        first = sum(sizes[:rank])
        mine = scores(dtype)[:, first : first + sizes[rank]].requires_grad_()
        gate, idx = sharded_topk(mine, k)
        finite = gate.nan_to_num(0, 0, 0)
        (finite * torch.arange(1, k + 1, dtype=dtype) * (rank + 1)).sum().backward()
        results.append((gate.detach(), idx, mine.grad))
    mine, last = scores()[:, first : first + sizes[rank]], rank == world - 1
    empty = sharded_topk(mine[:0], 3)[1]
    told = {
        "k": refusal(lambda: sharded_topk(mine, 14)),
        "batch": refusal(lambda: sharded_topk(mine[:2] if last else mine, 3)),
        "dtype": refusal(lambda: sharded_topk(mine.half() if last else mine, 3)),
        "shape": refusal(lambda: sharded_topk(mine[0] if last else mine, 3)),
        "zero": refusal(lambda: sharded_topk(mine, 0 if last else 3)),
    }
    return results, empty, told
