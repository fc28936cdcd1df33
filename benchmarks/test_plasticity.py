"""update_strength_: Oja's rule on the pairs of neurons that were active together, in place."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import bio_kernels
import torch
from bio_kernels import BlockSparse
from torch import Tensor

from . import inputs, peers
from .case import Case, Contestant, Inputs, Spec, in_double
from .session import Session

# All values lie within the bound before: see peers.rank_b_update.
RULE: dict[str, Any] = {"eta": 1e-2, "decay": 1.0, "bound": 2.0}


def rows(full: bool, cuda: bool) -> list[Spec]:
    return inputs.grid(directions=("update",), full=full, cuda=cuda) + inputs.sparse_grid("update", full)


def make(spec: Spec, device: str, seed: int) -> Inputs:
    strength, matrix = inputs.strength(spec, device, seed)
    pre, post = (inputs.normal(spec.batch, spec.k, seed=10 * seed + i, spec=spec, device=device) for i in range(2))
    x = {"strength": strength, "idx": inputs.indices(spec, device, seed), "pre": pre, "post": post}
    if isinstance(strength, BlockSparse):
        if matrix is not None:
            x["csr"] = strength.to_dense().detach().to_sparse_csr()
            x["pattern"] = strength
        return x
    return x | {"matrix": matrix}


sets = lru_cache(maxsize=1)(lambda spec, device: inputs.input_sets(spec, device, make))


def _values(x: Tensor | BlockSparse) -> Tensor:
    return x.blocks if isinstance(x, BlockSparse) else x


def ours(x: Inputs) -> tuple[Tensor, ...]:
    return (_values(bio_kernels.update_strength_(x["strength"], x["idx"], x["pre"], x["post"], **RULE)),)


def dense(x: Inputs) -> tuple[Tensor, ...]:
    updated = bio_kernels.update_strength_(x["strength"], x["idx"], x["pre"], x["post"], **RULE, backend="dense")
    return (_values(updated),)


def index_put(x: Inputs) -> tuple[Tensor, ...]:
    return (peers.naive_update(x["matrix"], x["idx"], x["pre"], x["post"], **RULE),)


def rank_b(x: Inputs) -> tuple[Tensor, ...]:
    return (peers.rank_b_update(x["matrix"], x["idx"], x["pre"], x["post"], **RULE),)


def sampled_addmm(x: Inputs) -> tuple[Tensor, ...]:
    return (peers.sampled_update(x["csr"], x["idx"], x["pre"], x["post"], **RULE),)


@lru_cache(maxsize=1)
def truth(spec: Spec, device: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The dense baseline in float64; the reference in float64 where no dense matrix exists."""
    x = {name: in_double(value) for name, value in sets(spec, device)[0].items() if name in ("strength", "pre", "post")}
    backend = "dense" if spec.n <= inputs.LARGEST_DENSE else "reference"
    idx = sets(spec, device)[0]["idx"]
    updated = bio_kernels.update_strength_(x["strength"], idx, x["pre"], x["post"], **RULE, backend=backend)
    return [_values(updated).detach()], {}


def cost(spec: Spec, idx: Tensor) -> tuple[int, int]:
    """Bytes and FLOPs. U different pairs were active together (of a block-sparse matrix: at most all stored values).

    Read and write U values of s bytes; read B K indices (8), pre and post. FLOPs 6 B K K (Hebb 2, decay 4).
    """
    s = torch.empty((), dtype=spec.dtype).element_size()
    pairs = (idx[:, :, None] * spec.n + idx[:, None, :]).unique().numel()
    if spec.storage == "block_sparse":
        pairs = pairs * inputs.BLOCKS_PER_ROW * inputs.BLOCK_SIZE // spec.n  # the share that is stored, on average
    return 2 * s * pairs + (8 + 2 * s) * idx.numel(), 6 * spec.batch * spec.k**2


def contestants(spec: Spec, session: Session, not_run: dict[str, str]) -> list[Contestant]:
    if spec.n > inputs.LARGEST_DENSE:
        not_run["every peer"] = "an N x N matrix does not fit, nor an index for every stored value"
        return []
    sparse = spec.storage == "block_sparse"
    found = [Contestant("dense", dense, waits=sparse)]  # for the number of blocks in each row
    if sparse:
        not_run["index_put_, rank-B addmm"] = "they would also change what a block-sparse matrix does not store"
        return [*found, Contestant("sampled_addmm", sampled_addmm)]
    found += [Contestant("index_put_(accumulate)", index_put), Contestant("decay + rank-B addmm", rank_b)]
    why = session.compiler.reason(spec.compiled, session.device)
    if why is None:
        found.append(session.compiler.compile("torch.compile", index_put, ()))
    else:
        not_run["torch.compile"] = why
    return found


def case(spec: Spec, session: Session) -> Case:
    """Everything about one row."""
    shared = sets(spec.inputs, session.device)
    not_run: dict[str, str] = {}

    def canonical(out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """sampled_addmm's result is sparse by elements: its values at the stored blocks."""
        if out[0].layout == torch.sparse_csr:
            return (inputs.stored_blocks(shared[0]["pattern"], out[0].to_dense()),)
        return out

    return Case(
        "update_strength_",
        spec,
        shared,
        Contestant("ours", ours, deterministic=True),
        contestants(spec, session, not_run),
        lambda: truth(spec.inputs, session.device),
        *cost(spec, shared[0]["idx"]),
        canonical=canonical,
        not_run=not_run,
    )


def test_update_strength(spec: Spec, session: Session, run) -> None:
    run(case(spec, session))
