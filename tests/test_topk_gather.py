"""topk_gather: which neurons are chosen, exactly; their rows; and where the gradients go."""

from __future__ import annotations

import math

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import generator
from torch import Tensor

from tests.ways import Way, compare, compare_as_is, every_way, every_way_and, leaf, outputs, same_bits

FEW = [  # (B, N, k, D)
    (3, 7, 1, 5),
    (1, 1, 1, 1),
    (2, 13, 13, 1),
    (3, 127, 13, 8),
    (2, 300, 127, 13),
    (0, 13, 3, 4),
    (1, 4500, 40, 3),  # more than one chunk for a program
]
MORE = [(2, 127, 127, 7), (2, 300, 300, 16), (1, 9000, 1, 2), (1, 40000, 1000, 130), (4, 4096, 64, 64)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).bfloat16().double()


def expected_idx(score: Tensor, k: int) -> Tensor:
    """The rule, spelled out for one value after the other: greatest first, NaN above all, ties to the lowest index."""
    rows = []
    for row in score.tolist():
        order = sorted(
            range(len(row)), key=lambda i: (not math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i)
        )
        rows.append(sorted(order[:k]))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), k)


@every_way_and("case", FEW, MORE)
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
def test_equals_dense(way: Way, case: tuple[int, ...], per_sample: bool) -> None:
    batch, n, k, width = case
    table = random(*((batch, n, width) if per_sample else (n, width)), seed=1)
    result = compare(bk.topk_gather, way, {"score": random(batch, n), "table": table}, k=k)
    assert result.idx.dtype == torch.int64
    assert torch.equal(result.idx.cpu(), expected_idx(random(batch, n).to(way.dtype), k))
    rows = leaf(table, way).detach()
    chosen = [rows[b if per_sample else ...][result.idx[b]] for b in range(batch)]
    assert all(same_bits(result.rows[b], chosen[b]) for b in range(batch)), "rows are copied, not computed"


SCORES = {
    "ties": torch.tensor([[2.0, 1, 2, 1, 2, 0, 1, 2, 1, 0, 2, 1, 1], [1.0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1]]),
    "constant": torch.full((2, 13), 0.5),
    "zeros of both signs": torch.tensor([[0.0, -0.0] * 6 + [0.0], [-0.0, 0.0] * 6 + [-1.0]]),
    "nan": torch.tensor(
        [[1.0, math.nan, 3, math.inf, math.nan, 0, 2, 5, 4, 1, 1, 7, -math.nan], [math.nan] * 12 + [9.0]]
    ),
    "all nan": torch.full((2, 13), math.nan),
    "infinities": torch.tensor([[math.inf, -math.inf] * 6 + [0.0], [-math.inf] * 6 + [math.inf] * 7]),
    "all minus infinity": torch.full((2, 13), -math.inf),
    "negative": -torch.arange(26.0).reshape(2, 13) - 1,
    "neighbours": torch.nextafter(torch.ones(2, 13), torch.tensor([2.0, 0.0] * 6 + [1.0])),
}


@every_way()
@pytest.mark.parametrize("kind", SCORES)
def test_order_of_scores(way: Way, kind: str) -> None:
    score, table = SCORES[kind].to(way.device, way.dtype), random(13, 3).to(way.device, way.dtype)
    for k in (1, 2, 5, 12, 13):
        result = bk.topk_gather(score, table, k, backend=way.backend)
        assert torch.equal(result.idx.cpu(), expected_idx(score, k)), f"k={k}"
        assert same_bits(result.gate, score.gather(1, result.idx)), "the gate keeps the score's own bits"


@every_way(single=True)
@pytest.mark.parametrize("values", [1, 3], ids=lambda v: f"{v}_values")
def test_many_stages_select_as_one(way: Way, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 and 256 scores: up to three stages on a short row, with ties across them."""
    if way.backend == "triton":
        select = pytest.importorskip("bio_kernels._topk_select")
        monkeypatch.setattr(select, "WHOLE", 256)
        monkeypatch.setattr(select, "CHUNK", 128)
    score = torch.randint(values, (1, 1000), generator=generator(values)).to(way.device, way.dtype)
    table = torch.arange(1000.0, device=way.device)[:, None]
    for k in (1, 8, 100):
        result = bk.topk_gather(score, table, k, backend=way.backend)
        assert torch.equal(result.idx.cpu(), expected_idx(score, k))
        assert torch.equal(result.rows[..., 0].long(), result.idx)


@every_way(single=True)
def test_a_k_beyond_the_kernels_is_refused(way: Way) -> None:
    score, table = torch.rand(1, 40000, device=way.device), torch.rand(40000, 1, device=way.device)
    if way.backend == "triton":
        with pytest.raises(RuntimeError, match="k=20000"):
            bk.topk_gather(score, table, 20000, backend="triton")
    else:
        assert bk.topk_gather(score, table, 20000, backend=way.backend).idx.shape == (1, 20000)


@every_way(single=True)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "flipped storage offset"])
def test_layouts(way: Way, layout: str) -> None:
    make = {
        "transposed": lambda b, n: random(n, b).to(way.device, way.dtype).requires_grad_().t(),
        "sliced": lambda b, n: random(b, 2 * n).to(way.device, way.dtype).requires_grad_()[:, ::2],
        "expanded": lambda b, n: random(1, n).to(way.device, way.dtype).requires_grad_().expand(b, n),
        "flipped storage offset": lambda b, n: random(b + 3, n + 5).to(way.device, way.dtype).requires_grad_()[3:, 5:],
    }[layout]
    compare_as_is(bk.topk_gather, way, {"score": make(3, 13), "table": make(13, 7)}, k=5)


@every_way()
def test_a_row_chosen_by_all_gets_the_sum(way: Way) -> None:
    table = torch.ones(5, 2, device=way.device, dtype=way.dtype, requires_grad=True)
    score = torch.arange(5.0, device=way.device, dtype=way.dtype).expand(30, 5)
    bk.topk_gather(score, table, 2, backend=way.backend).rows.sum().backward()
    assert table.grad is not None
    assert table.grad.tolist() == [[0, 0]] * 3 + [[30, 30]] * 2


@every_way(single=True)
def test_only_what_is_asked_for_gets_a_gradient(way: Way) -> None:
    score = random(2, 7).to(way.device, way.dtype).requires_grad_()
    table = random(7, 3).to(way.device, way.dtype)
    bk.topk_gather(score, table, 3, backend=way.backend).gate.sum().backward()
    assert score.grad is not None
    assert table.grad is None
    assert not bk.topk_gather(score, table, 3, backend=way.backend).idx.requires_grad


@every_way(single=True)
def test_mixed_dtypes_keep_their_own(way: Way) -> None:
    score = random(2, 13).to(way.device, torch.float32).requires_grad_()
    table = random(13, 3).to(way.device, torch.float16).requires_grad_()
    result = bk.topk_gather(score, table, 4, backend=way.backend)
    assert [x.dtype for x in outputs(result)] == [torch.float32, torch.float16]
    (result.gate.sum() + result.rows.sum()).backward()
    assert score.grad is not None
    assert score.grad.dtype == torch.float32
    assert table.grad is not None
    assert table.grad.dtype == torch.float16


@every_way()
def test_sparse_grad_holds_the_same_sum(way: Way) -> None:
    result = compare(
        bk.topk_gather, way, {"score": random(3, 13), "table": random(13, 4, seed=1)}, k=6, sparse_grad=True
    )
    assert result.rows.shape == (3, 6, 4)
    table = leaf(random(13, 4, seed=1), way)
    bk.topk_gather(leaf(random(3, 13), way), table, 6, sparse_grad=True, backend=way.backend).rows.sum().backward()
    assert table.grad is not None
    assert table.grad.layout == torch.sparse_coo
    assert table.grad._nnz() == 3 * 6
