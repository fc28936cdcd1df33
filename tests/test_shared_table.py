"""shared_table: one table used several times, and its gradients summed as small as they come."""

from __future__ import annotations

from typing import Any

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import make_inputs
from torch import Tensor

from tests.ways import Way, close, every_way, exact, leaf, same_bits


def step(x: dict[str, Tensor], uses: tuple[Tensor, ...], sparse: tuple[bool, ...], backend: str) -> Tensor:
    """Three uses of one matrix of strengths: attention, spreading activation, and attention again."""
    common: dict[str, Any] = {"gate": x["gate"], "backend": backend}
    first = bk.sparse_attention(x["q"], x["k"], x["v"], x["idx"], uses[0], sparse_grad=sparse[0], **common)
    spread = bk.weighted_rows(uses[1], x["idx"], x["gate"], sparse_grad=sparse[1], backend=backend)
    second = bk.sparse_attention(first, x["k"], x["v"], x["idx"], uses[2], sparse_grad=sparse[2], **common)
    return (
        second.float().square().sum() + spread.float().sum()
        if second.dtype != torch.float64
        else (second.square().sum() + spread.sum())
    )


def arguments(way: Way, batch: int = 3, n: int = 24, k: int = 6) -> dict[str, Tensor]:
    x = make_inputs(batch, n, k)
    return {name: leaf(getattr(x, name), way) for name in ("q", "k", "v", "idx", "gate", "strength")}


@every_way()
@pytest.mark.parametrize("sparse", [(True, True, True), (True, False, True)], ids=["sparse", "one strided"])
def test_the_gradient_is_the_sum(way: Way, sparse: tuple[bool, ...]) -> None:
    x = arguments(way)
    y = {name: exact(value) for name, value in x.items()}
    step(x, bk.shared_table(x["strength"], 3), sparse, way.backend).backward()
    step(y, (y["strength"],) * 3, sparse, "dense").backward()
    assert x["strength"].grad is not None
    assert y["strength"].grad is not None
    assert x["strength"].grad.layout == torch.strided
    assert x["strength"].grad.dtype == way.dtype
    if way.dtype in (torch.float64, torch.float32):
        close(x["strength"].grad, y["strength"].grad, way, "gradient of the table")
    else:  # each of the three gradients was rounded before they were added, and one went through a 16-bit output
        assert float((x["strength"].grad.double().cpu() - y["strength"].grad).abs().max()) < 0.02 * float(
            y["strength"].grad.abs().max()
        )
    assert same_bits(x["idx"], y["idx"].to(way.device))


@every_way()
def test_many_small_gradients_add_up_in_wide_precision(way: Way) -> None:
    """One row chosen by 4096 samples: in 16 bits the running sum would stop at 2048 (float16) or 256 (bfloat16)."""
    batch = 64 if way.interpreted else 4096
    table = torch.ones(2, 1, device=way.device, dtype=way.dtype, requires_grad=True)
    idx = torch.zeros(batch, 1, device=way.device, dtype=torch.int64)
    weight = torch.ones(batch, 1, device=way.device, dtype=way.dtype)
    (alias,) = bk.shared_table(table, 1)
    bk.weighted_rows(alias, idx, weight, sparse_grad=True, backend=way.backend).sum().backward()
    assert table.grad is not None
    assert table.grad.tolist() == [[batch], [0]]


@every_way(single=True)
def test_an_unused_alias_adds_nothing(way: Way) -> None:
    x = arguments(way)
    first, _ = bk.shared_table(x["strength"], 2)
    bk.weighted_rows(first, x["idx"], x["gate"], sparse_grad=True, backend=way.backend).sum().backward()
    expected = arguments(way)
    bk.weighted_rows(expected["strength"], x["idx"], x["gate"].detach(), backend=way.backend).sum().backward()
    assert x["strength"].grad is not None
    assert expected["strength"].grad is not None
    close(x["strength"].grad, expected["strength"].grad.double(), way)


def test_aliases_share_memory_and_version() -> None:
    table = torch.ones(4, 4, requires_grad=True)
    aliases = bk.shared_table(table, 3)
    assert len(aliases) == 3
    assert all(a.data_ptr() == table.data_ptr() for a in aliases)
    with torch.no_grad():
        table.mul_(2)
    assert all(torch.equal(a, table) for a in aliases)


def test_without_gradients_the_table_itself_is_handed_out() -> None:
    table = torch.ones(4, 4)
    assert all(alias is table for alias in bk.shared_table(table, 2))
    with torch.no_grad():
        table.requires_grad_()
        assert bk.shared_table(table, 1)[0] is table


def test_accumulation_over_two_backward_passes() -> None:
    table = torch.ones(4, 3, requires_grad=True)
    idx, weight = torch.tensor([[1, 1]]), torch.ones(1, 2)
    for _ in range(2):
        (alias,) = bk.shared_table(table, 1)
        bk.weighted_rows(alias, idx, weight, sparse_grad=True).sum().backward()
    assert table.grad is not None
    assert table.grad.sum(1).tolist() == [0, 12, 0, 0]


def test_a_table_of_rows_for_topk_gather() -> None:
    table, score = torch.rand(9, 3, requires_grad=True), torch.rand(4, 9)
    a, b = bk.shared_table(table, 2)
    loss = bk.topk_gather(score, a, 3, sparse_grad=True).rows.sum() + bk.topk_gather(score, b, 3).rows.sum()
    loss.backward()
    counts = torch.zeros(9).index_add_(0, bk.topk_gather(score, table, 3).idx.flatten(), torch.ones(12))
    assert table.grad is not None
    assert torch.equal(table.grad, 2 * counts[:, None].expand(9, 3))


@pytest.mark.parametrize(
    ("table", "uses", "error", "message"),
    [
        ([1.0], 1, TypeError, r"table must be a torch.Tensor"),
        (torch.ones(2).to_sparse(), 1, TypeError, r"table must be a strided tensor, got layout torch.sparse_coo"),
        (torch.ones(2, 2), 0, ValueError, r"uses must be in 1\.\..*got 0"),
        (torch.ones(2, 2), 1.5, TypeError, r"uses must be an int, got float"),
        (torch.ones(2, 2), True, TypeError, r"uses must be an int, got bool"),
        (torch.ones(2, 2, dtype=torch.int32), 1, TypeError, r"table must be one of float32"),
    ],
)
def test_faults(table: Any, uses: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bk.shared_table(table, uses)
