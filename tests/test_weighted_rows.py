"""weighted_rows: sums of chosen rows of a dense, a per-sample and a block-sparse table."""

from __future__ import annotations

import math

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import active_neurons, generator, make_inputs
from torch import Tensor, nn

from tests.ways import Way, close, compare, compare_as_is, every_way, every_way_and, leaf

FEW = [  # (B, N, K, M)
    (3, 7, 1, 5),
    (1, 1, 1, 1),
    (2, 13, 13, 127),
    (3, 127, 13, 7),
    (0, 13, 3, 4),
    (2, 64, 70, 300),  # more slots than neurons: repeats are certain
]
MORE = [(2, 300, 127, 300), (1, 300, 300, 13), (5, 1000, 64, 1000)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).bfloat16().double()


def any_idx(batch: int, k: int, n: int, seed: int = 2) -> Tensor:
    """Unsorted, with repeats within a sample."""
    return torch.randint(n, (batch, k), generator=generator(seed))


@every_way_and("case", FEW, MORE)
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
def test_equals_dense(way: Way, case: tuple[int, ...], per_sample: bool) -> None:
    batch, n, k, width = case
    table = random(*((batch, n, width) if per_sample else (n, width)))
    out = compare(
        bk.weighted_rows, way, {"table": table, "idx": any_idx(batch, k, n), "weight": random(batch, k, seed=1)}
    )
    assert out.dtype == way.dtype
    assert out.shape == (batch, width)


@every_way_and("case", [(2, 16, 5, 16), (3, 96, 13, 16), (2, 128, 127, 32), (0, 64, 3, 64), (1, 256, 40, 128)],
               [(1, 256, 300, 128), (3, 1088, 64, 16), (4, 2048, 128, 64)])  # fmt: skip
def test_block_sparse_equals_dense(way: Way, case: tuple[int, ...]) -> None:
    batch, n, k, block_size = case
    strength = make_inputs(1, n, 1, storage="block_sparse", block_size=block_size).strength
    compare(bk.weighted_rows, way, {"table": strength, "idx": any_idx(batch, k, n), "weight": random(batch, k, seed=1)})


@every_way()
def test_without_any_stored_block(way: Way) -> None:
    """A matrix of which nothing is stored is zero; its rows are zero, and so are the weights' gradients."""
    blocks = nn.Parameter(torch.empty(0, 16, 16, dtype=way.dtype, device=way.device))
    offsets, cols = torch.zeros(4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    table = bk.BlockSparse(blocks, offsets.to(way.device), cols.to(way.device))
    weight = leaf(random(2, 5), way)
    out = bk.weighted_rows(table, any_idx(2, 5, 48).to(way.device), weight, backend=way.backend)
    out.sum().backward()
    assert out.shape == (2, 48)
    assert not out.any()
    assert weight.grad is not None
    assert not weight.grad.any()
    assert blocks.grad is not None
    assert blocks.grad.shape == (0, 16, 16)


@every_way()
def test_by_hand(way: Way) -> None:
    """strength[pre, post]: what is active sends along its row."""
    strength = torch.tensor([[0.0, 2, 0], [0, 0, 4], [8, 0, 0]], device=way.device, dtype=way.dtype)
    idx = torch.tensor([[0, 1], [2, 2]], device=way.device)
    weight = torch.tensor([[1.0, 0.5], [1, -3]], device=way.device, dtype=way.dtype)
    out = bk.weighted_rows(strength, idx, weight, backend=way.backend)
    assert out.tolist() == [[0, 2, 2], [-16, 0, 0]]


@every_way()
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
def test_an_infinity_stays_in_its_column(way: Way, storage: str) -> None:
    """-inf is a connection that must never be used; the neurons it does not lead to are not touched by it."""
    dense = torch.zeros(48, 48, dtype=way.dtype, device=way.device)
    dense[:16, :16], dense[:16, 32:], dense[20, 40] = 1, 2, 3
    dense[3, 5], dense[4, 33] = -math.inf, math.nan
    table = bk.BlockSparse.from_dense(dense, 16) if storage == "block_sparse" else dense
    idx = torch.tensor([[3, 4, 20]], device=way.device)
    out = bk.weighted_rows(table, idx, torch.ones(1, 3, dtype=way.dtype, device=way.device), backend=way.backend)
    expected = dense[idx[0]].double().sum(0, keepdim=True)
    assert out[0, 5] == -math.inf
    assert out[0, 33].isnan()
    close(out, expected, way)


@every_way(single=True)
def test_rows_that_are_not_chosen_are_not_read(way: Way) -> None:
    table = torch.full((7, 3), math.nan, device=way.device)
    table[2] = 1.0
    table.requires_grad_()
    out = bk.weighted_rows(table, torch.tensor([[2, 2]], device=way.device), torch.ones(1, 2, device=way.device),
                           backend=way.backend)  # fmt: skip
    out.sum().backward()
    assert out.tolist() == [[2, 2, 2]]
    assert table.grad is not None
    assert table.grad.sum() == 6


@every_way_and("dtype", [torch.int32, torch.int64], single=True)
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
def test_index_dtypes(way: Way, dtype: torch.dtype, storage: str) -> None:
    x = make_inputs(3, 32, 5, storage=storage)
    compare(bk.weighted_rows, way, {"table": x.strength, "idx": x.idx.to(dtype), "weight": x.gate})


@every_way(single=True)
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
@pytest.mark.parametrize("kind", ["table", "weight"])
def test_mixed_dtypes(way: Way, storage: str, kind: str) -> None:
    """One of the two in float16: the sum is float32 all the same, the output follows the table."""
    half, single = way._replace(dtype=torch.float16), way
    x = make_inputs(3, 32, 5, storage=storage)
    table, weight = (
        leaf(x.strength, half if kind == "table" else single),
        leaf(x.gate, half if kind == "weight" else single),
    )
    out = compare_as_is(bk.weighted_rows, half, {"table": table, "idx": x.idx.to(way.device), "weight": weight})
    assert out.dtype == (torch.float16 if kind == "table" else torch.float32)
    assert weight.grad is not None
    assert weight.grad.dtype == weight.dtype


@every_way(single=True)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_layouts(way: Way, layout: str) -> None:
    def make(*shape: int) -> Tensor:
        x = {
            "transposed": lambda: random(*reversed(shape)).to(way.device, way.dtype),
            "sliced": lambda: random(*shape[:-1], 3 * shape[-1]).to(way.device, way.dtype),
            "expanded": lambda: random(*shape[:-1], 1).to(way.device, way.dtype),
        }[layout]().requires_grad_()
        return {
            "transposed": lambda: x.permute(*reversed(range(x.dim()))),
            "sliced": lambda: x[..., ::3],
            "expanded": lambda: x.expand(*shape),
        }[layout]()

    idx = any_idx(5, 3, 13).to(way.device).t()
    compare_as_is(bk.weighted_rows, way, {"table": make(13, 7), "idx": idx, "weight": make(3, 5)})
    compare_as_is(bk.weighted_rows, way, {"table": make(3, 13, 7), "idx": idx, "weight": make(3, 5)})


@every_way(single=True)
def test_only_what_is_asked_for_gets_a_gradient(way: Way) -> None:
    idx, weight = any_idx(2, 3, 7).to(way.device), leaf(random(2, 3), way)
    table = random(7, 3).to(way.device, way.dtype)
    bk.weighted_rows(table, idx, weight, backend=way.backend).sum().backward()
    assert weight.grad is not None
    assert table.grad is None
    table, weight = table.requires_grad_(), weight.detach()
    bk.weighted_rows(table, idx, weight, backend=way.backend).sum().backward()
    assert table.grad is not None
    assert weight.grad is None


@every_way()
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_sparse_grad_holds_the_same_sum(way: Way, dtype: torch.dtype) -> None:
    arguments = {"table": random(13, 7), "idx": active_neurons(3, 13, 6).to(dtype), "weight": random(3, 6, seed=1)}
    compare(bk.weighted_rows, way, arguments, sparse_grad=True)
    table = leaf(arguments["table"], way)
    idx, weight = arguments["idx"].to(way.device), leaf(arguments["weight"], way)
    bk.weighted_rows(table, idx, weight, sparse_grad=True, backend=way.backend).sum().backward()
    assert table.grad is not None
    assert table.grad.layout == torch.sparse_coo
    assert table.grad._nnz() == 3 * 6


@every_way_and("kind", ["zipf", "clustered"])
def test_hot_neurons_sum_in_wide_precision(way: Way, kind: str) -> None:
    """Neurons active in almost every sample: their gradient has a term for each, and is rounded once."""
    batch, n, k = (40, 64, 16) if way.interpreted else (600, 64, 16)
    table, weight = torch.ones(n, 3, dtype=torch.float64), torch.ones(batch, k, dtype=torch.float64)
    compare(bk.weighted_rows, way, {"table": table, "idx": active_neurons(batch, n, k, kind), "weight": weight})
