"""Offsets beyond 2**31 elements. Memory is committed where it is touched: gigabytes of addresses, megabytes of pages.

The interpreter computes int32 offsets in int32, so a lost cast to int64 shows: a wrapped offset falls into the 2**31
elements of zeros that lie before every large tensor, and gives a wrong number.
"""

from __future__ import annotations

import math
import mmap
import resource
from collections.abc import Iterator

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import make_inputs
from torch import Tensor

from tests.ways import Way, close, every_way, leaf

N = 46_352  # N * N is 2**31 + 1,024,256
FAR = [0, 7, N - 21, N - 20, N - 2, N - 1]
PAGES = 1.5e9  # bytes a test may commit; the matrices have 4.3e9 to 8.6e9

pytestmark = pytest.mark.default_memory


@pytest.fixture(autouse=True)
def few_pages(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a CPU: what is measured is the growth of the largest resident size so far, so earlier tests hide nothing."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    marked = request.node.get_closest_marker("pages")
    assert grown < (marked.args[0] if marked else PAGES), (
        f"{grown / 1e9:.1f} GB were committed: the whole matrix was touched"
    )


def lazy(way: Way, *shape: int) -> Tensor:
    """Memory that is zero and takes no page until it is written; on a CPU with as much before it as int32 can reach."""
    if way.device == "cuda":
        return torch.zeros(shape, dtype=way.dtype, device="cuda")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # its value on Linux
    memory = mmap.mmap(-1, (2**31 + math.prod(shape)) * way.dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=way.dtype)[2**31 :].view(shape)


def small(way: Way, batch: int = 1) -> dict[str, Tensor]:
    """Inputs for a pool of six neurons, and the places of those six in the large one."""
    x = make_inputs(batch, 6, 6)
    assert isinstance(x.strength, Tensor)
    kept = {name: leaf(getattr(x, name), way) for name in ("q", "k", "v", "gate", "strength", "pre", "post")}
    return {**kept, "idx": x.idx.to(way.device), "far": torch.tensor(FAR, device=way.device)[x.idx.to(way.device)]}


def large(way: Way, part: Tensor) -> Tensor:
    """(N, N) whose rows and columns FAR hold ``part``; the rest is never written."""
    strength = lazy(way, N, N)
    far = torch.tensor(FAR, device=way.device)
    strength[far[:, None], far] = part.detach()
    return strength


def large_blocks(way: Way, part: Tensor) -> tuple[bk.BlockSparse, list[int]]:
    """All 363 x 363 blocks of 128 x 128 stored, 2**31 + 11,419,648 values; ``part`` at the places returned."""
    rows = 363
    blocks = lazy(way, rows * rows, 128, 128)
    offsets = torch.arange(0, rows * rows + 1, rows, dtype=torch.int32, device=way.device)
    cols = torch.arange(rows, dtype=torch.int32, device=way.device).repeat(rows)
    places = [0, 7, *(rows * 128 - back for back in (21, 20, 2, 1))]
    for i, pre in enumerate(places):
        for j, post in enumerate(places):
            blocks[(pre // 128) * rows + post // 128, pre % 128, post % 128] = part[i, j].detach()
    return bk.BlockSparse(torch.nn.Parameter(blocks), offsets, cols), places


@every_way(single=True)
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
def test_attention(way: Way, storage: str) -> None:
    x = small(way)
    expected = bk.sparse_attention(x["q"], x["k"], x["v"], x["idx"], x["strength"], gate=x["gate"], backend=way.backend)
    grads = torch.autograd.grad(expected.sum(), [x["q"], x["k"], x["v"], x["gate"]])
    strength, far = (large(way, x["strength"]), x["far"]) if storage == "dense" else large_blocks(way, x["strength"])
    far = far if isinstance(far, Tensor) else torch.tensor([far], device=way.device)
    if isinstance(strength, bk.BlockSparse):
        strength.blocks.requires_grad_(False)
    out = bk.sparse_attention(x["q"], x["k"], x["v"], far, strength, gate=x["gate"], backend=way.backend)
    close(out, expected.double(), way)
    for grad, truth in zip(torch.autograd.grad(out.sum(), [x["q"], x["k"], x["v"], x["gate"]]), grads, strict=True):
        close(grad, truth.double(), way)


@every_way(single=True)
def test_sparse_gradient_of_a_large_matrix(way: Way) -> None:
    x = small(way)
    bk.sparse_attention(x["q"], x["k"], x["v"], x["idx"], x["strength"], backend=way.backend).square().sum().backward()
    strength = large(way, x["strength"]).requires_grad_()
    bk.sparse_attention(
        x["q"], x["k"], x["v"], x["far"], strength, sparse_grad=True, backend=way.backend
    ).square().sum().backward()
    assert strength.grad is not None
    assert x["strength"].grad is not None
    pre, post = strength.grad._indices()
    place = torch.full((N,), -1, device=way.device)
    place[torch.tensor(FAR, device=way.device)] = torch.arange(6, device=way.device)
    total = torch.zeros(6, 6, device=way.device).index_put_(
        (place[pre], place[post]), strength.grad._values(), accumulate=True
    )
    close(total, x["strength"].grad.double(), way)


@every_way(single=True)
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
def test_weighted_rows(way: Way, storage: str) -> None:
    """Of the rows only six columns were written, and only they are looked at."""
    x = small(way)
    expected = bk.weighted_rows(x["strength"], x["idx"], x["gate"], backend=way.backend)
    strength, far = (large(way, x["strength"]), FAR) if storage == "dense" else large_blocks(way, x["strength"])
    if isinstance(strength, bk.BlockSparse):
        strength.blocks.requires_grad_(False)
    idx = torch.tensor([far], device=way.device)
    out = bk.weighted_rows(strength, idx, x["gate"], backend=way.backend)
    close(out[:, far], expected.double(), way)
    grad_out = torch.zeros_like(out)
    grad_out[:, far] = torch.arange(1.0, 7, device=way.device)
    (truth,) = torch.autograd.grad(expected, x["gate"], grad_out[:, far])
    (grad,) = torch.autograd.grad(out, x["gate"], grad_out)
    close(grad, truth.double(), way)


@every_way(single=True)
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_update(way: Way, storage: str, dtype: torch.dtype) -> None:
    way = way._replace(dtype=dtype)
    x = {name: t.detach() for name, t in small(way).items()}
    strength, far = (large(way, x["strength"]), FAR) if storage == "dense" else large_blocks(way, x["strength"])
    rule = {"eta": 0.1, "decay": 1.0, "bound": 2.0, "backend": way.backend}
    idx = torch.tensor([far], device=way.device)
    bk.update_strength_(x["strength"], x["idx"], x["pre"], x["post"], **rule)
    bk.update_strength_(strength, idx, x["pre"], x["post"], **rule)
    if isinstance(strength, bk.BlockSparse):
        blocks = strength.blocks.detach()
        found = torch.stack([blocks[p // 128 * 363 + q // 128, p % 128, q % 128] for p in far for q in far]).view(6, 6)
    else:
        found = strength[idx[0][:, None], idx[0]]
    close(found, x["strength"].double(), way)


@every_way(single=True)
def test_rows_of_a_large_table(way: Way) -> None:
    table = lazy(way._replace(dtype=torch.float16), N, N)
    table[FAR] = torch.arange(6.0, dtype=torch.float16, device=way.device)[:, None]
    score = torch.zeros(1, N, device=way.device)
    score[0, FAR] = 1.0
    rows = bk.topk_gather(score, table, 6, backend=way.backend).rows[0]
    assert torch.equal(rows, torch.arange(6.0, device=way.device)[:, None].expand(6, N).half())


@pytest.mark.slow
@pytest.mark.pages(14e9)
@every_way(single=True)
def test_gradient_of_a_large_table(way: Way) -> None:
    """A strided gradient of (N, N) is really written: 4.3 GB of zeros, and the reference sums in twice that."""
    table = lazy(way._replace(dtype=torch.float16), N, N)
    table[FAR] = 1.0
    weight = torch.ones(1, 6, device=way.device, dtype=torch.float16)
    out = bk.weighted_rows(table.requires_grad_(), torch.tensor([FAR], device=way.device), weight, backend=way.backend)
    (grad,) = torch.autograd.grad(out, table, torch.ones_like(out))
    assert all(bool((grad[row] == 1).all()) for row in FAR)
    assert not grad[1].any()
    assert not grad[N - 3].any()
