"""Cases over matrices that are too large for the suite: a dense one of 65,536 neurons, block-sparse ones of more.

Everything is drawn on the device. What is compared are the values between active neurons, or the stored ones: no
N x N tensor is ever made for the truth.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bio_kernels
import torch
from bio_kernels import BlockSparse
from torch import Tensor

from .. import inputs, peers, test_attention, test_plasticity
from ..case import Case, Contestant, Inputs, Spec, in_double, leaf, leaves
from .setting import Setting

LEAVES, PEER_LEAVES = test_attention.LEAVES, test_attention.PEER_LEAVES
SETS = 2


def _drawn(setting: Setting) -> torch.Generator:
    return torch.Generator(setting.device).manual_seed(0)


# ------------------------------------------------------------------------------------------------- attention


def attention_case(setting: Setting, flex: bool = False) -> Case:
    """Attention over a dense matrix of 65,536 neurons, forward and backward; ours with a sparse gradient.

    flex: against FlexAttention, and otherwise against all others.
    """
    spec = Spec(32, n=65_536, heads=4, dtype=torch.bfloat16, direction="both")
    if setting.rehearsal:
        spec = Spec(2, n=256, k=8, heads=2, width=16)
    matrix = torch.empty(spec.n, spec.n, dtype=spec.dtype, device=setting.device)
    matrix.normal_(0.0, 0.3, generator=_drawn(setting)).requires_grad_()
    small = replace(spec, n=256)
    sets = []
    for seed in range(SETS):
        x = test_attention.make(small, setting.device, seed)
        x |= {"idx": inputs.indices(spec, setting.device, seed), "strength": matrix, "matrix": matrix}
        sets.append(x | {"cuda": setting.cuda})
    active = sets[0]["idx"].unique()
    moved, flops = test_attention.cost(spec)
    size, pairs = matrix.element_size(), spec.batch * spec.k**2
    return Case(
        "sparse_attention, sparse gradient",
        spec,
        sets,
        Contestant("ours", _ours, LEAVES, deterministic=True),
        [test_attention.flex(setting.session())] if flex else _attention_peers(setting),
        lambda: _attention_truth(sets[0], active),
        moved + 20 * pairs - size * spec.n**2,  # 4 bytes and two indices a pair, and no N x N gradient
        flops,
        gradients=lambda grads: {name: _between(name, grad, active) for name, grad in grads.items()},
        graphs=False,  # of each peer it would keep N x N gradients
    )


def _ours(x: Inputs) -> tuple[Tensor, ...]:
    out = bio_kernels.sparse_attention(
        x["q"], x["k"], x["v"], x["idx"], x["strength"], gate=x["gate"], sparse_grad=True
    )
    return (out,)


def _attention_peers(setting: Setting) -> list[Contestant]:
    def plain(function: Any) -> Any:
        return lambda x: (function(x["q"], x["k"], x["v"], x["matrix"], x["idx"], x["gate"]),)

    return [
        Contestant("gather + einsum", plain(peers.naive_attention), PEER_LEAVES),
        Contestant("SDPA with gathered bias", plain(peers.sdpa), PEER_LEAVES),
        *peers.sdpa_backends(setting.cuda, PEER_LEAVES),
    ]


def _between(name: str, grad: Tensor, active: Tensor) -> Tensor:
    """The gradient of the matrix between the active neurons, (U, U); other gradients as they are."""
    if name not in ("strength", "matrix"):
        return grad
    if grad.layout == torch.strided:
        return grad[active][:, active]
    place = torch.full((grad.shape[0],), -1, device=active.device)
    place[active] = torch.arange(len(active), device=active.device)
    pre, post = place[grad._indices()]
    total = torch.zeros(len(active), len(active), dtype=torch.float64, device=active.device)
    return total.index_put_((pre, post), grad._values().double(), accumulate=True).to(grad.dtype)


def _attention_truth(x: Inputs, active: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The reference in float64 over the pool of the active neurons alone."""
    matrix = x["matrix"].detach()[active][:, active].double().requires_grad_()
    double = {name: in_double(x[name]) for name in ("q", "k", "v", "gate")} | {"strength": matrix}
    idx = torch.searchsorted(active, x["idx"])
    out = bio_kernels.sparse_attention(
        double["q"], double["k"], double["v"], idx, matrix, gate=double["gate"], backend="reference"
    )
    wanted = leaves(Contestant("", _ours, LEAVES), double)
    grads = dict(zip(LEAVES, torch.autograd.grad(out, wanted, x["grad"][0].double()), strict=True))
    return [out.detach()], grads | {"matrix": grads["strength"]}


# ------------------------------------------------------------------------------------------------- plasticity


def update_case(setting: Setting, n: int) -> Case:
    """Oja's rule on a block-sparse matrix of n neurons, against sampled_addmm on the same values as CSR."""
    spec = Spec(32, n=n, storage="block_sparse", direction="update")
    if setting.rehearsal:
        spec = replace(spec, batch=2, n=256, k=8)
    strength = random_blocks(setting, spec.n, inputs.BLOCKS_PER_ROW, inputs.BLOCK_SIZE)
    csr, sets = as_csr(strength), []
    for seed in range(SETS):
        pre, post = (
            inputs.normal(spec.batch, spec.k, seed=10 * seed + i, spec=spec, device=setting.device) for i in range(2)
        )
        x = {"strength": strength, "csr": csr, "idx": inputs.indices(spec, setting.device, seed)}
        sets.append(x | {"pre": pre, "post": post, "cuda": setting.cuda})

    def truth() -> tuple[list[Tensor], dict[str, Tensor]]:
        double = {name: in_double(sets[0][name]) for name in ("strength", "pre", "post")}
        updated = bio_kernels.update_strength_(
            double["strength"], sets[0]["idx"], double["pre"], double["post"], **test_plasticity.RULE,
            backend="reference",
        )  # fmt: skip
        return [leaf(updated).detach()], {}

    return Case(
        "update_strength_",
        spec,
        sets,
        Contestant("ours", test_plasticity.ours, deterministic=True),
        [Contestant("sampled_addmm", test_plasticity.sampled_addmm)],
        truth,
        *test_plasticity.cost(spec, sets[0]["idx"]),
        canonical=lambda out: (blocks_of(out[0], strength),) if out[0].layout == torch.sparse_csr else out,
    )


def random_blocks(setting: Setting, n: int, blocks_per_row: int, block_size: int, dtype=torch.float32) -> BlockSparse:
    layout: dict[str, Any] = {"blocks_per_row": blocks_per_row, "block_size": block_size, "dtype": dtype}
    return BlockSparse.random(n, std=0.3, generator=_drawn(setting), device=setting.device, **layout)


def as_csr(matrix: BlockSparse) -> Tensor:
    """The stored values one by one, a copy; every block row must store the same number of blocks."""
    n, p = matrix.shape[0], matrix.block_size
    cols = matrix.cols.view(n // p, 1, -1, 1) * p + torch.arange(p, device=matrix.cols.device, dtype=torch.int32)
    cols = cols.expand(-1, p, -1, -1)
    per_row = cols.shape[2] * p
    start = torch.arange(0, n * per_row + 1, per_row, device=cols.device, dtype=torch.int32)
    values = matrix.blocks.detach().view(n // p, -1, p, p).transpose(1, 2)
    return torch.sparse_csr_tensor(start, cols.reshape(-1), values.reshape(-1), (n, n))


def blocks_of(csr: Tensor, like: BlockSparse) -> Tensor:
    """The inverse of as_csr: (Z, P, P)."""
    p = like.block_size
    return csr.values().view(like.shape[0] // p, p, -1, p).transpose(1, 2).reshape(like.blocks.shape)
