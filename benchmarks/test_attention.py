"""sparse_attention: gated attention among the active neurons, biased by the strength of their connections."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import lru_cache

import bio_kernels
import torch
from bio_kernels.testing import generator
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from . import inputs, measure, peers
from .case import Case, Contestant, Inputs, Spec, in_double, leaves
from .session import Session

LEAVES = ("q", "k", "v", "strength", "gate")
PEER_LEAVES = ("q", "k", "v", "matrix", "gate")
DIRECTIONS = ("forward", "backward", "both")
SILENT = 64  # silent neurons that the dense truth computes and masks for each sample


def rows(full: bool, cuda: bool) -> list[Spec]:
    specs = inputs.grid(directions=DIRECTIONS, full=full, cuda=cuda)
    # FlexAttention runs forward only on a CPU: the compilers take part there too
    specs = [replace(s, compiled=s.compiled or (s.batch == 32 and s.direction == "forward")) for s in specs]
    return specs + inputs.sparse_grid("both", full)


def make(spec: Spec, device: str, seed: int) -> Inputs:
    shape = (spec.batch, spec.heads, spec.k, spec.width // spec.heads)
    q, k, v, grad = (inputs.normal(*shape, seed=10 * seed + i, spec=spec, device=device) for i in range(4))
    strength, matrix = inputs.strength(spec, device, seed)
    gate = torch.rand(spec.batch, spec.k, generator=generator(seed)).mul(0.9).add(0.05).to(device, spec.dtype)
    x = {"q": inputs.leaf(q), "k": inputs.leaf(k), "v": inputs.leaf(v), "gate": inputs.leaf(gate), "grad": (grad,)}
    return x | {"strength": strength, "matrix": matrix, "idx": inputs.indices(spec, device, seed)}


sets = lru_cache(maxsize=1)(lambda spec, device: inputs.input_sets(spec, device, make))


def ours(x: Inputs) -> tuple[Tensor, ...]:
    return (bio_kernels.sparse_attention(x["q"], x["k"], x["v"], x["idx"], x["strength"], gate=x["gate"]),)


@lru_cache(maxsize=1)
def truth(spec: Spec, device: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The dense baseline in float64, of each sample over a pool of its active neurons and SILENT others.

    Neurons outside that pool are as silent as those within, which the baseline computes and masks: the whole pool would
    change nothing and take far longer. Where no dense matrix exists, it is the reference in float64.
    """
    x = {name: in_double(value) for name, value in sets(spec, device)[0].items()}
    grad = x["grad"][0].double()
    if x["matrix"] is None:
        out = bio_kernels.sparse_attention(
            x["q"], x["k"], x["v"], x["idx"], x["strength"], gate=x["gate"], backend="reference"
        )
        grads = torch.autograd.grad(out, leaves(Contestant("", ours, LEAVES), x), grad)
        return [out.detach()], dict(zip(LEAVES, grads, strict=True))
    outs, grads = [], {name: torch.zeros_like(x[name]) for name in PEER_LEAVES}
    for b in range(spec.batch):
        others = torch.randint(spec.n, (SILENT,), generator=generator(b)).to(device)
        pool = torch.cat([x["idx"][b], others]).unique()
        q, k, v, gate = (x[name][b : b + 1].detach().requires_grad_() for name in ("q", "k", "v", "gate"))
        matrix = x["matrix"].detach()[pool][:, pool].requires_grad_()
        where = torch.searchsorted(pool, x["idx"][b : b + 1])
        out = bio_kernels.sparse_attention(q, k, v, where, matrix, gate=gate, backend="dense")
        *own, of_matrix = torch.autograd.grad(out, [q, k, v, gate, matrix], grad[b : b + 1])
        for name, g in zip(("q", "k", "v", "gate"), own, strict=True):
            grads[name][b] = g[0]
        grads["matrix"].index_put_((pool[:, None], pool), of_matrix, accumulate=True)
        outs.append(out.detach())
    strength, matrix = x["strength"], grads["matrix"]
    sparse = isinstance(strength, bio_kernels.BlockSparse)
    grads["strength"] = inputs.stored_blocks(strength, matrix) if sparse else matrix
    return [torch.cat(outs)], {name: g.detach() for name, g in grads.items()}


def cost(spec: Spec) -> tuple[int, int]:
    """Bytes and FLOPs. X = B H K Dh elements of q, k, v or out, P = B K K pairs; a value is s bytes, a delta 4.

    forward: read q, k, v, the bias of each pair once, idx (8), gate; write out: s (4 X + P). FLOPs 4 P H Dh.
    backward: read q, k, v, out and its gradient, write three gradients: 8 s X; the bias again and its gradient:
    s P + 8 P; write the gradient of the matrix: s N N, or of its stored blocks. FLOPs 10 P H Dh. both: the sum.
    (Two products of K K Dh forward and five backward, for each head and sample.)
    """
    s = torch.empty((), dtype=spec.dtype).element_size()
    x, pairs = spec.batch * spec.k * spec.width, spec.batch * spec.k**2
    columns = spec.n if spec.storage == "dense" else inputs.BLOCKS_PER_ROW * inputs.BLOCK_SIZE
    small = spec.batch * spec.k * (8 + s)
    forward = s * (4 * x + pairs) + small
    backward = 8 * s * x + (s + 8) * pairs + s * spec.n * columns + small
    moved = {"forward": forward, "backward": backward, "both": forward + backward}[spec.direction]
    return moved, {"forward": 4, "backward": 10, "both": 14}[spec.direction] * pairs * spec.width


@lru_cache(maxsize=4)
def dense_seconds(spec: Spec, device: str) -> dict[str, float]:
    """Time of the dense baseline for one sample and each direction: H N N scores.

    Measured on one sample, twice forward and once backward, and not in turn with the others: it takes seconds.
    """
    one = replace(spec, batch=1)
    x = make(one, device, 0)

    def dense(x: Inputs) -> tuple[Tensor, ...]:
        return (
            bio_kernels.sparse_attention(
                x["q"], x["k"], x["v"], x["idx"], x["matrix"], gate=x["gate"], backend="dense"
            ),
        )

    contestant = Contestant("dense", dense, PEER_LEAVES)

    def once(direction: str) -> float:
        return measure.seconds(measure.prepare(contestant, direction, x), device == "cuda")

    if device == "cuda":
        once("both")  # the libraries' first call
    forward = statistics.median(once("forward") for _ in range(2))
    backward = once("backward")
    return {"forward": forward, "backward": backward, "both": forward + backward}


def contestants(spec: Spec, session: Session, case: Case) -> list[Contestant]:
    """The peers; ``case`` takes what is measured apart and what cannot run."""
    if spec.n > inputs.LARGEST_DENSE:
        case.not_run["every peer"] = "an N x N matrix does not fit; torch gathers no pairs from a block-sparse one"
        return []

    def plain(function):
        return lambda x: (function(x["q"], x["k"], x["v"], x["matrix"], x["idx"], x["gate"]),)

    if session.short:
        case.not_run["dense"] = "left out by --short: it takes seconds a sample"
    else:
        one = Spec(1, n=spec.n, k=spec.k, width=spec.width, heads=spec.heads, dtype=spec.dtype)
        each = dense_seconds(one, session.device)
        case.fixed["dense"] = each[spec.direction] * spec.batch
        case.notes.append("dense: one sample measured apart from the others, times B; both is forward + backward")
    naive, sdpa = plain(peers.naive_attention), plain(peers.sdpa)
    found = [Contestant("gather + einsum", naive, PEER_LEAVES)]
    found.append(Contestant("SDPA with gathered bias", sdpa, PEER_LEAVES))
    found += peers.sdpa_backends(session.cuda, PEER_LEAVES)
    why = session.compiler.reason(spec.compiled, session.device)
    if why is not None:
        case.not_run |= {"torch.compile": why, "FlexAttention": why}
        return found
    return [*found, session.compiler.compile("torch.compile", naive, PEER_LEAVES), flex(session)]


def flex(session: Session) -> Contestant:
    """FlexAttention, compiled."""
    compiled = torch.compile(flex_attention, dynamic=False)
    directions = DIRECTIONS if session.cuda else ("forward",)  # on a CPU torch refuses its backward

    def run(x: Inputs) -> tuple[Tensor, ...]:
        if not session.cuda:  # there it also refuses what could be differentiated
            x = {name: value.detach() if isinstance(value, Tensor) else value for name, value in x.items()}
        return peers.flex_attention(compiled, x)

    return session.compiler.timed("FlexAttention", run, PEER_LEAVES, directions=directions)


def case(spec: Spec, session: Session) -> Case:
    """Everything about one row."""
    shared = sets(spec.inputs, session.device)
    case = Case(
        "sparse_attention",
        spec,
        shared,
        Contestant("ours", ours, LEAVES, deterministic=True),
        [],
        lambda: truth(spec.inputs, session.device),
        *cost(spec),
    )
    case.peers = contestants(spec, session, case)
    return case


def test_sparse_attention(spec: Spec, session: Session, run) -> None:
    run(case(spec, session))
