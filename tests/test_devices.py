"""What depends on where tensors lie: several GPUs, indices that a GPU does not check, shapes at a kernel's limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bio_kernels as bk
import pytest
import torch
from bio_kernels import _autograd
from bio_kernels._backend import on_its_device
from bio_kernels.testing import make_inputs
from torch import Tensor

from tests.ways import Way, compare, every_way, leaf


class Second(Tensor):
    """Stands in for a tensor on the second GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 1)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The GPU that is torch's current one, first 0."""
    stack = [0]

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        stack.append(which.index)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: stack[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return stack


def test_kernels_are_launched_where_their_tensors_are(current: list[int]) -> None:
    def body(name: str, x: Tensor, y: Tensor) -> tuple[str, int]:
        return name, current[-1]

    here = torch.zeros(2)
    there = here.as_subclass(Second)
    assert on_its_device(body, "a", there, here) == ("a", 1)
    assert on_its_device(body, "a", here, here) == ("a", 0), "a CPU has no current device"
    current[0] = 1
    assert on_its_device(body, "a", there, here) == ("a", 1)
    assert current == [1], "and torch's current one is left as it was"
    assert on_its_device(lambda n: n, 3) == 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_the_second_gpu() -> None:
    x = make_inputs(2, 32, 4).to(torch.float32, "cuda:1")
    out = bk.weighted_rows(x.strength, x.idx, x.gate, backend="triton")
    assert out.device.index == 1
    torch.testing.assert_close(out, bk.weighted_rows(x.strength, x.idx, x.gate, backend="reference"))


# ------------------------------------------------------------------------------------------------- indices


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the range of indices is not looked at."""
    monkeypatch.setattr(_autograd, "_inside", _autograd._masked)


BAD = torch.tensor([[3, -1, 8, 5], [2**40, 0, 7, -(2**62)]])
GOOD = (BAD >= 0) & (BAD < 8)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("few", [False, True], ids=["rows", "entries"])
def test_sparse_gradients_of_rows_out_of_range_are_nothing(few: bool) -> None:
    """An index of -1 would be added to the last row, one past the end to whatever lies there."""
    weight, grad = torch.rand(2, 4), torch.rand(2, 6)
    weight[~GOOD] = torch.inf  # not even infinity times zero
    if few:
        grad = torch.zeros(2, 6)
        grad[0, 1] = grad[1, 4] = 2.0
    sparse = _autograd._rows_coo(torch.zeros(8, 6), BAD, weight, grad)
    assert int(sparse._indices().min()) >= 0
    assert int(sparse._indices()[0].max()) < 8
    expected = torch.zeros(8, 6)
    for b, j in GOOD.nonzero().tolist():
        expected[BAD[b, j]] += weight[b, j] * grad[b]
    torch.testing.assert_close(sparse.to_dense(), expected)


@pytest.mark.usefixtures("unchecked")
def test_sparse_gradients_of_pairs_out_of_range_are_nothing() -> None:
    delta, count = torch.rand(2, 4, 4), torch.tensor([3, 4])
    delta[0, 3], delta[0, :, 3] = 0, 0
    sparse = _autograd._pairs_coo(delta, BAD, count, 8)
    assert int(sparse._indices().min()) >= 0
    assert int(sparse._indices().max()) < 8
    expected = torch.zeros(8, 8)
    used = GOOD & (torch.arange(4) < count[:, None])
    for b, j in used.nonzero().tolist():
        for i in used[b].nonzero().flatten().tolist():
            expected[BAD[b, j], BAD[b, i]] += delta[b, j, i]
    torch.testing.assert_close(sparse.to_dense(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_sparse_gradients_follow_no_index_out_of_range() -> None:
    idx, table = BAD.cuda(), torch.rand(8, 6, device="cuda", requires_grad=True)
    (shared,) = bk.shared_table(table, 1)
    bk.weighted_rows(shared, idx, torch.ones(2, 4, device="cuda"), sparse_grad=True).sum().backward()
    assert table.grad is not None
    assert table.grad[:, 0].tolist() == [1, 0, 0, 1, 0, 1, 0, 1]


# ------------------------------------------------------------------------------------------------- shapes


def attention_inputs(batch: int, n: int, k: int, heads: int, width: int) -> dict[str, Any]:
    x = make_inputs(batch, n, k, heads=heads, head_width=width)
    return {name: getattr(x, name) for name in ("q", "k", "v", "idx", "strength", "gate")}


@every_way(single=True)
def test_no_heads(way: Way) -> None:
    """Nothing is computed, and nothing uninitialised comes back."""
    x = {name: leaf(value, way) for name, value in attention_inputs(2, 16, 5, 1, 4).items()}
    x |= {name: x[name].detach()[:, :0].requires_grad_() for name in "qkv"}
    bk.sparse_attention(**x, backend=way.backend).sum().backward()
    for name in ("strength", "gate"):
        assert x[name].grad is not None
        assert not x[name].grad.any()


@every_way(single=True)
def test_heads_wider_than_the_tiles(way: Way) -> None:
    compare(bk.sparse_attention, way, attention_inputs(1, 24, 17, 1, 600))


def test_a_strided_block_layout_is_stored_in_one_piece() -> None:
    """Kernels read row_offsets and cols one after another."""
    strength = make_inputs(2, 96, 5, storage="block_sparse").strength
    assert isinstance(strength, bk.BlockSparse)
    spread = [torch.stack([x, x + 7], 1)[:, 0] for x in (strength.row_offsets, strength.cols)]
    again = bk.BlockSparse(strength.blocks, *spread)
    assert again.row_offsets.is_contiguous()
    assert again.cols.is_contiguous()
    assert torch.equal(again.to_dense(), strength.to_dense())
