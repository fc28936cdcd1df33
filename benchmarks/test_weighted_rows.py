"""weighted_rows: the weighted sum of chosen rows, of the connection matrix (N x N) or a readout (N x 256); P3."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import bio_kernels
import torch
from torch import Tensor

from . import inputs, peers
from .case import Case, Contestant, Inputs, Spec, in_double, leaves
from .session import Session

LEAVES, PEER_LEAVES = ("table", "weight"), ("matrix", "weight")
DIRECTIONS = ("forward", "backward", "both")
N = 4096
NAIVE = "gather + einsum"


def rows(full: bool, cuda: bool) -> list[Spec]:
    """The matrix has M = N columns, the readout 256."""
    matrix = inputs.grid(directions=DIRECTIONS, full=full, cuda=cuda, width=N)
    readout = [Spec(32, direction=d, width=256) for d in DIRECTIONS]
    sparse = inputs.sparse_grid("both", full)
    return matrix + readout + [replace(spec, width=spec.n) for spec in sparse]


def make(spec: Spec, device: str, seed: int) -> Inputs:
    if spec.width == spec.n:
        table, matrix = inputs.strength(spec, device, seed)
    else:
        table = matrix = inputs.leaf(inputs.normal(spec.n, spec.width, seed=100 + seed, spec=spec, device=device))
    weight = inputs.leaf(inputs.normal(spec.batch, spec.k, seed=seed, spec=spec, device=device))
    grad = inputs.normal(spec.batch, spec.width, seed=200 + seed, spec=spec, device=device)
    idx = inputs.indices(spec, device, seed)
    return {"table": table, "matrix": matrix, "weight": weight, "idx": idx, "grad": (grad,)}


sets = lru_cache(maxsize=1)(lambda spec, device: inputs.input_sets(spec, device, make))


def ours(x: Inputs) -> tuple[Tensor, ...]:
    return (bio_kernels.weighted_rows(x["table"], x["idx"], x["weight"]),)


@lru_cache(maxsize=1)
def truth(spec: Spec, device: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The dense baseline in float64; where no dense matrix exists, the reference in float64."""
    x = {name: in_double(value) for name, value in sets(spec, device)[0].items()}
    backend = "reference" if x["matrix"] is None else "dense"
    out = bio_kernels.weighted_rows(x["table"], x["idx"], x["weight"], backend=backend)
    own = leaves(Contestant("", ours, LEAVES), x)
    grads = dict(zip(LEAVES, torch.autograd.grad(out, own, x["grad"][0].double()), strict=True))
    if x["matrix"] is x["table"] or not isinstance(x["table"], bio_kernels.BlockSparse):
        grads["matrix"] = grads["table"]
    elif x["matrix"] is not None:
        dense = bio_kernels.weighted_rows(x["matrix"], x["idx"], x["weight"], backend="dense")
        grads["matrix"] = torch.autograd.grad(dense, x["matrix"], x["grad"][0].double())[0]
    return [out.detach()], grads


def cost(spec: Spec, idx: Tensor) -> tuple[int, int]:
    """Bytes and FLOPs. R different rows of C columns are read (C = M, or what is stored of a row), s bytes a value.

    forward: read R C values, idx (8) and weight; write B M: s R C + s B M. FLOPs 2 B K C.
    backward: read R C and B M values; write N C values of gradient, and B K: s (R C + B M + N C). FLOPs 4 B K C.
    """
    s = torch.empty((), dtype=spec.dtype).element_size()
    columns = spec.width if spec.storage == "dense" else inputs.BLOCKS_PER_ROW * inputs.BLOCK_SIZE
    read, entries = idx.unique().numel() * columns, spec.batch * spec.k
    forward = s * (read + spec.batch * spec.width) + (8 + s) * entries
    backward = s * (read + spec.batch * spec.width + spec.n * columns) + (8 + 2 * s) * entries
    moved = {"forward": forward, "backward": backward, "both": forward + backward}[spec.direction]
    return moved, {"forward": 2, "backward": 4, "both": 6}[spec.direction] * entries * columns


def contestants(spec: Spec, session: Session, case: Case) -> list[Contestant]:
    if spec.n > inputs.LARGEST_DENSE:
        case.not_run["every peer"] = "an N x N matrix does not fit, and torch has no dense @ block-sparse"
        return []

    def naive(x: Inputs) -> tuple[Tensor, ...]:
        return (peers.naive_weighted_rows(x["matrix"], x["idx"], x["weight"]),)

    def bag(x: Inputs) -> tuple[Tensor, ...]:
        return (peers.embedding_bag(x["matrix"], x["idx"], x["weight"]),)

    def dense(x: Inputs) -> tuple[Tensor, ...]:
        return (bio_kernels.weighted_rows(x["matrix"], x["idx"], x["weight"], backend="dense"),)

    found = [Contestant(NAIVE, naive, PEER_LEAVES), Contestant("embedding_bag", bag, PEER_LEAVES)]
    found.append(Contestant("dense", dense, PEER_LEAVES))
    why = session.compiler.reason(spec.compiled, session.device)
    if why is None:
        found.append(session.compiler.compile("torch.compile", naive, PEER_LEAVES))
    else:
        case.not_run["torch.compile"] = why
    return found


def case(spec: Spec, session: Session) -> Case:
    """Everything about one row."""
    shared = sets(spec.inputs, session.device)
    case = Case(
        "weighted_rows",
        spec,
        shared,
        Contestant("ours", ours, LEAVES, deterministic=True),
        [],
        lambda: truth(spec.inputs, session.device),
        *cost(spec, shared[0]["idx"]),
    )
    case.peers = contestants(spec, session, case)
    return case


def test_weighted_rows(spec: Spec, session: Session, run, check_target) -> None:
    row = run(case(spec, session))
    if not session.cuda and replace(spec, direction="both", compiled=False) == Spec(32, width=N):
        check_p3(row, check_target)


def check_p3(row: dict, check_target) -> None:
    """P3: against gather + einsum. The memory target is of the forward pass: backward, both make an N x N gradient."""
    what = f"weighted_rows with the N x N table, B=32, {row['direction']}, against {NAIVE}"
    if row["direction"] == "forward":
        check_target("P3", what, row["ratios"][NAIVE], 10)
        memory = row["memory_bytes"]["ours"] / row["memory_bytes"][NAIVE]
        check_target("P3", f"peak memory, {what}", memory, 0.1, at_least=False)
    elif row["direction"] == "both":
        check_target("P3", what, row["ratios"][NAIVE], 3)
