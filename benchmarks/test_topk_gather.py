"""topk_gather: the k best neurons and their rows, against torch.topk and a gather."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import bio_kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from . import inputs, peers
from .case import Case, Contestant, Inputs, Spec, in_double
from .session import Session

LEAVES = ("score", "table")
DIRECTIONS = ("forward", "backward", "both")


def rows(full: bool, cuda: bool) -> list[Spec]:
    """Indices come from the scores: their distribution is that of the highest ones, uniform or a SPROUT's."""
    specs = inputs.grid(directions=DIRECTIONS, full=full, cuda=cuda)
    specs = [spec for spec in specs if spec.distribution in ("uniform", "sprout")]
    large = {65_536: 256, 1_048_576: 16} if full else {65_536: 256}  # N: D, so that the float64 truth fits
    return specs + [Spec(4, n=n, width=width, direction="forward") for n, width in large.items()]


def make(spec: Spec, device: str, seed: int) -> Inputs:
    """Scores are float32 in every row: in bfloat16 many tie, and peers that break ties otherwise are no peers."""
    score = inputs.normal(spec.batch, spec.n, seed=seed, spec=replace(spec, dtype=torch.float32), device=device)
    if spec.distribution == "sprout":  # what a SPROUT selects stands above the rest
        score.scatter_add_(1, inputs.indices(spec, device, seed), torch.full((spec.batch, spec.k), 20.0, device=device))
    table = inputs.normal(spec.n, spec.width, seed=100 + seed, spec=spec, device=device)
    grad_rows = inputs.normal(spec.batch, spec.k, spec.width, seed=200 + seed, spec=spec, device=device)
    grad_gate = torch.randn(spec.batch, spec.k, generator=inputs.generator(300 + seed)).to(device)
    return {"score": inputs.leaf(score), "table": inputs.leaf(table), "k": spec.k, "grad": (grad_gate, grad_rows)}


sets = lru_cache(maxsize=1)(lambda spec, device: inputs.input_sets(spec, device, make))


def canonical(out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ascending by index: peers select in another order."""
    gate, idx, rows = out
    idx, order = idx.sort(1)
    return gate.gather(1, order), idx, rows.gather(1, order[:, :, None].expand_as(rows))


@lru_cache(maxsize=1)
def truth(spec: Spec, device: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    x = sets(spec, device)[0]
    score, table = in_double(x["score"]), in_double(x["table"])
    out = bio_kernels.topk_gather(score, table, spec.k, backend="dense")
    grads = torch.autograd.grad((out.gate, out.rows), (score, table), [g.double() for g in x["grad"]])
    return [o.detach() for o in out], dict(zip(LEAVES, grads, strict=True))


def cost(spec: Spec) -> tuple[int, int]:
    """Bytes and FLOPs. Scores are 4 bytes, indices 8, a table value s; selecting is counted as one FLOP a score.

    forward: read B N scores and B K D values; write B K (D values, gate, index).
    backward: read B K (D values, gate, index); write the gradients B N and N D. both: the sum.
    """
    s = torch.empty((), dtype=spec.dtype).element_size()
    b, n, k, d = spec.batch, spec.n, spec.k, spec.width
    forward = 4 * b * n + s * b * k * d + b * k * (s * d + 12)
    backward = b * k * (s * d + 12) + 4 * b * n + s * n * d
    total = {"forward": forward, "backward": backward, "both": forward + backward}[spec.direction]
    return total, b * n + (0 if spec.direction == "forward" else b * k * d)


def contestants(spec: Spec, session: Session, not_run: dict[str, str]) -> list[Contestant]:
    def dense(x: Inputs) -> tuple[Tensor, ...]:
        return tuple(bio_kernels.topk_gather(x["score"], x["table"], x["k"], backend="dense"))

    def naive(x: Inputs) -> tuple[Tensor, ...]:
        return peers.naive_topk_gather(x["score"], x["table"], x["k"])

    def index_select(x: Inputs) -> tuple[Tensor, ...]:
        gate, idx = torch.topk(x["score"], x["k"], dim=1, sorted=False)
        return gate, idx, x["table"].index_select(0, idx.flatten()).view(*idx.shape, -1)

    def embedding(x: Inputs) -> tuple[Tensor, ...]:
        gate, idx = torch.topk(x["score"], x["k"], dim=1, sorted=False)
        return gate, idx, F.embedding(idx, x["table"])

    found = [Contestant("topk + table[idx]", naive, LEAVES), Contestant("topk + index_select", index_select, LEAVES)]
    found.append(Contestant("topk + embedding", embedding, LEAVES))
    if spec.batch * spec.n * spec.width <= 2**27:
        found.append(Contestant("dense", dense, LEAVES))
    else:
        not_run["dense"] = "gathers from a pool expanded to (B, N, D): too large"
    flashinfer, why = peers.flashinfer_topk(session.cuda)
    if flashinfer is None:
        not_run["flashinfer.top_k"] = why
    else:
        found.append(flashinfer)
    why = session.compiler.reason(spec.compiled, session.device)
    if why is None:
        found.append(session.compiler.compile("torch.compile", naive, LEAVES))
    else:
        not_run["torch.compile"] = why
    return found


def ours(x: Inputs) -> tuple[Tensor, ...]:
    return tuple(bio_kernels.topk_gather(x["score"], x["table"], x["k"]))


def case(spec: Spec, session: Session) -> Case:
    """Everything about one row."""
    shared = sets(spec.inputs, session.device)
    not_run: dict[str, str] = {}
    return Case(
        "topk_gather",
        spec,
        shared,
        Contestant("ours", ours, LEAVES, deterministic=True),
        contestants(spec, session, not_run),
        lambda: truth(spec.inputs, session.device),
        *cost(spec),
        canonical=canonical,
        not_run=not_run,
        notes=[peers.cutedsl_note(session.cuda)],
    )


def test_topk_gather(spec: Spec, session: Session, run) -> None:
    run(case(spec, session))
