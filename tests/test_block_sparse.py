"""BlockSparse: the conversions, what holds it (state_dict, optimizers, safetensors, pickle), and what it refuses."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import make_inputs
from torch import Tensor, nn


def matrix(n: int = 96, block_size: int = 16) -> tuple[Tensor, bk.BlockSparse]:
    strength = make_inputs(1, n, 1, storage="block_sparse", block_size=block_size).strength
    assert isinstance(strength, bk.BlockSparse)
    return strength.to_dense().detach(), strength


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_dense_and_back(block_size: int) -> None:
    dense, strength = matrix(4 * block_size, block_size)
    assert strength.shape == dense.shape
    assert strength.block_size == block_size
    assert torch.equal(bk.BlockSparse.from_dense(dense, block_size).to_dense(), dense)
    tiles = dense.reshape(4, block_size, 4, block_size).abs().sum((1, 3))
    assert strength.blocks.shape[0] == int((tiles > 0).sum()) < 16, "zero blocks are left out, and there are some"
    assert strength.row_offsets[-1] == strength.row_offsets[-2], "the last block row is empty"


def test_only_blocks_that_are_all_zero_are_left_out() -> None:
    dense = torch.zeros(48, 48)
    dense[0, 47], dense[20, 20], dense[40, 1] = 1e-30, float("nan"), -0.0
    strength = bk.BlockSparse.from_dense(dense, 16)
    assert strength.cols.tolist() == [2, 1]
    assert strength.row_offsets.tolist() == [0, 1, 2, 2]
    assert bk.BlockSparse.from_dense(torch.zeros(48, 48), 16).blocks.shape == (0, 16, 16)
    assert not bk.BlockSparse.from_dense(torch.zeros(48, 48), 16).to_dense().any()


def test_the_strongest_blocks_of_each_row() -> None:
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(96, 96, generator=g)
    strength = bk.BlockSparse.from_dense(dense, 16, blocks_per_row=2)
    norm = dense.reshape(6, 16, 6, 16).double().square().sum((1, 3))
    expected = [sorted(sorted(range(6), key=lambda c, row=row: -row[c])[:2]) for row in norm.tolist()]
    assert strength.cols.view(6, 2).tolist() == expected
    tiles = dense.reshape(6, 16, 6, 16).transpose(1, 2)
    assert torch.equal(strength.blocks, tiles[torch.arange(6).repeat_interleave(2), strength.cols.long()])
    assert torch.equal(bk.BlockSparse.from_dense(dense, 16, blocks_per_row=6).to_dense(), dense)


def test_the_layout_is_regular_also_where_blocks_are_zero() -> None:
    dense = torch.zeros(64, 64)
    dense[5, 60], dense[20, 20], dense[20, 40], dense[40, 3] = 1e-30, -2.0, 2.0, float("nan")
    strength = bk.BlockSparse.from_dense(dense, 16, blocks_per_row=2)
    assert strength.cols.view(4, 2).tolist() == [[0, 3], [1, 2], [0, 1], [0, 1]], "ties go to the lowest column"
    assert bk.BlockSparse.from_dense(dense, 16, blocks_per_row=1).cols.tolist() == [3, 1, 0, 0]
    with pytest.raises(ValueError, match=r"blocks_per_row must be in 1\.\.4 .*got 0"):
        bk.BlockSparse.from_dense(dense, 16, blocks_per_row=0)


def test_bsr_tensors_share_memory() -> None:
    dense, strength = matrix()
    bsr = strength.to_sparse_bsr()
    assert torch.equal(bsr.to_dense(), dense)
    back = bk.BlockSparse.from_sparse_bsr(bsr)
    assert torch.equal(back.to_dense(), dense)
    assert back.blocks.data_ptr() == strength.blocks.data_ptr()
    assert torch.equal(bk.BlockSparse.from_sparse_bsr(dense.to_sparse_bsr((16, 16))).to_dense(), dense)


def test_the_dense_form_is_differentiable() -> None:
    dense, strength = matrix()
    weight = torch.randn_like(dense)
    (strength.to_dense() * weight).sum().backward()
    assert strength.blocks.grad is not None
    expected = bk.BlockSparse(strength.blocks.grad, strength.row_offsets, strength.cols).to_dense()
    stored = bk.BlockSparse(torch.ones_like(strength.blocks), strength.row_offsets, strength.cols).to_dense()
    assert torch.equal(expected, weight * stored)


def test_random_has_the_same_number_of_blocks_in_each_row() -> None:
    g = torch.Generator().manual_seed(3)
    strength = bk.BlockSparse.random(1024, blocks_per_row=5, block_size=64, std=0.5, generator=g)
    assert strength.row_offsets.diff().tolist() == [5] * 16
    assert all(len(set(row.tolist())) == 5 for row in strength.cols.view(16, 5))
    assert 0.48 < float(strength.blocks.std()) < 0.52
    again = bk.BlockSparse.random(1024, blocks_per_row=5, block_size=64, std=0.5, generator=g.manual_seed(3))
    assert torch.equal(strength.blocks, again.blocks)
    assert torch.equal(strength.cols, again.cols)
    zeros = bk.BlockSparse.random(64, blocks_per_row=4, block_size=16, std=0.0)
    assert zeros.blocks.shape == (16, 16, 16)
    assert not zeros.blocks.any()


class Holder(nn.Module):
    def __init__(self, strength: bk.BlockSparse) -> None:
        super().__init__()
        self.strength = strength


def spread(strength: bk.BlockSparse) -> Tensor:
    return bk.weighted_rows(strength, torch.tensor([[3, 90]]), torch.ones(1, 2, dtype=strength.blocks.dtype))


def test_state_dict_of_another_layout_of_the_same_size() -> None:
    """Loading replaces the layout too, and with it how far a search has to go."""
    dense = torch.zeros(96, 96)
    dense[:16] = torch.randn(16, 96)
    source = Holder(bk.BlockSparse.from_dense(dense, 16))  # six blocks in one row
    target = Holder(bk.BlockSparse.from_dense(torch.eye(96), 16))  # one in each
    assert source.strength.storage.search_steps > target.strength.storage.search_steps
    assert set(source.state_dict()) == {"strength.blocks", "strength.row_offsets", "strength.cols"}
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.strength.to_dense(), dense)
    assert target.strength.storage.search_steps == source.strength.storage.search_steps
    assert torch.equal(spread(target.strength), dense[3:4] + dense[90:91])


@pytest.mark.parametrize("stored", [0, 7, 36])
def test_state_dict_of_another_number_of_blocks(stored: int) -> None:
    dense, strength = matrix()
    source = torch.zeros(36, 16, 16, dtype=torch.float64)
    source[:stored] = 1.0
    source = source.view(6, 6, 16, 16).transpose(1, 2).reshape(96, 96)
    parameter = strength.blocks
    strength.to_dense().sum().backward()
    strength.load_state_dict(bk.BlockSparse.from_dense(source, 16).state_dict())
    assert torch.equal(strength.to_dense(), source)
    assert strength.blocks is parameter
    assert parameter.grad is None, "a gradient of another shape"
    assert torch.equal(spread(strength), source[3:4] + source[90:91])
    assert not torch.equal(source, dense)


def test_a_state_dict_that_is_no_layout_is_refused() -> None:
    dense, strength = matrix()
    state = strength.state_dict()
    wrong = {"cols": state["cols"] + 6, "row_offsets": state["row_offsets"] * 2, "blocks": state["blocks"][1:]}
    for name, x in wrong.items():
        with pytest.raises(RuntimeError, match=r"strength\.(cols|row_offsets) must"):
            Holder(strength).load_state_dict({f"strength.{k}": v for k, v in {**state, name: x}.items()})
    assert torch.equal(strength.to_dense(), dense), "nothing was changed"
    with pytest.raises(RuntimeError, match="size mismatch for row_offsets"):
        strength.load_state_dict(bk.BlockSparse.random(64, blocks_per_row=1, block_size=16).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for blocks"):
        strength.load_state_dict(bk.BlockSparse.random(192, blocks_per_row=1, block_size=32).state_dict())


def test_more_neurons() -> None:
    dense, strength = matrix()
    strength.blocks.requires_grad_(False)
    g = torch.Generator().manual_seed(3)
    more = strength.grown(32, blocks_per_row=3, generator=g)
    assert more.shape == (128, 128)
    assert torch.equal(more.to_dense()[:96, :96], dense)
    assert not more.to_dense()[96:].any()
    assert not more.to_dense()[:, 96:].any()
    assert more.row_offsets.diff().tolist() == [*strength.row_offsets.diff().tolist(), 3, 3]
    assert torch.equal(more.cols, torch.cat([strength.cols, more.cols[-6:]]))
    assert torch.equal(more.cols, strength.grown(32, blocks_per_row=3, generator=g.manual_seed(3)).cols)
    assert isinstance(more.blocks, nn.Parameter)
    assert not more.blocks.requires_grad
    reached = torch.cat([strength.grown(16, blocks_per_row=2, generator=g).cols[-2:] for _ in range(99)])
    assert reached.unique().tolist() == list(range(7)), "columns of the whole new matrix"
    for n in (0, 8, 24, -16):
        with pytest.raises(ValueError, match=f"n must be a positive multiple of block_size=16, got {n}"):
            strength.grown(n, blocks_per_row=1)
    with pytest.raises(ValueError, match=r"blocks_per_row must be in 1\.\.7 .*got 8"):
        strength.grown(16, blocks_per_row=8)


@pytest.mark.parametrize("rows", [[0, 2, 3, 5], [4], [0, 1, 2, 3, 4, 5], [5]])
def test_some_of_the_neurons(rows: list[int]) -> None:
    dense, strength = matrix()
    fewer, slot = strength.selected(torch.tensor(rows))
    neurons = torch.cat([torch.arange(16 * r, 16 * r + 16) for r in rows])
    assert torch.equal(fewer.to_dense(), dense[neurons][:, neurons])
    assert torch.equal(fewer.blocks, strength.blocks[slot])
    assert fewer.cols.dtype == strength.cols.dtype
    assert isinstance(fewer.blocks, nn.Parameter)
    fixed = bk.BlockSparse(strength.blocks.detach(), strength.row_offsets, strength.cols)
    assert not list(fixed.selected(torch.tensor(rows))[0].parameters())


@pytest.mark.parametrize("rows", [[], [1, 1], [2, 1], [0.0], [[0]], [-1, 2], [4, 6]])
def test_rows_that_are_refused(rows: list) -> None:
    x = torch.tensor(rows, dtype=torch.float32 if rows == [0.0] else torch.int64)
    with pytest.raises(ValueError, match=r"rows must be (1-D int64|in 0\.\.5, got)"):
        matrix()[1].selected(x)


@pytest.mark.parametrize("way", ["deepcopy", "torch.save", "safetensors"])
def test_copies_are_whole_and_independent(way: str, tmp_path: Path) -> None:
    dense, strength = matrix()
    holder = Holder(strength)
    if way == "deepcopy":
        other = copy.deepcopy(holder)
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(holder.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(holder)
        nn.init.zeros_(other.strength.blocks)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(holder.state_dict(), tmp_path / "model.safetensors")
        other = copy.deepcopy(holder)
        nn.init.zeros_(other.strength.blocks)
        other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    nn.init.zeros_(holder.strength.blocks)
    assert torch.equal(other.strength.to_dense(), dense)
    assert isinstance(other.strength.blocks, nn.Parameter)


def test_an_optimizer_and_a_module_see_one_parameter() -> None:
    _, strength = matrix()
    holder = Holder(strength).float()
    assert [name for name, _ in holder.named_parameters()] == ["strength.blocks"]
    before = holder.strength.blocks.detach().clone()
    optimizer = torch.optim.SGD(holder.parameters(), lr=1.0)
    spread(holder.strength).sum().backward()
    optimizer.step()
    assert holder.strength.blocks.grad is not None
    assert torch.equal(holder.strength.blocks, before - holder.strength.blocks.grad)
    holder.to(torch.bfloat16)
    assert holder.strength.blocks.dtype == torch.bfloat16
    assert holder.strength.cols.dtype == torch.int32
    assert holder.to("meta").strength.blocks.is_meta


def test_a_plain_tensor_is_a_buffer_and_takes_no_gradient() -> None:
    _, strength = matrix()
    fixed = bk.BlockSparse(strength.blocks.detach(), strength.row_offsets, strength.cols)
    assert not list(fixed.parameters())
    assert "blocks" in dict(fixed.named_buffers())
    assert "6 blocks" in repr(fixed) or "blocks of 16 x 16" in repr(fixed)


GOOD = {"blocks": torch.zeros(3, 16, 16), "row_offsets": torch.tensor([0, 2, 3]), "cols": torch.tensor([0, 1, 1])}
FAULTS = [
    ({"blocks": torch.zeros(3, 8, 8)}, ValueError, r"blocks must be \(Z, P, P\) with P in .*16.*\(3, 8, 8\)"),
    ({"blocks": torch.zeros(3, 16, 32)}, ValueError, r"blocks must be .*\(3, 16, 32\)"),
    ({"blocks": torch.zeros(3, 16)}, ValueError, r"blocks must be"),
    (
        {"blocks": torch.zeros(3, 16, 16, dtype=torch.int32)},
        TypeError,
        r"blocks must be floating point, got torch.int32",
    ),
    ({"cols": torch.tensor([0.0, 1, 1])}, TypeError, r"cols must be int32 or int64, got torch.float32"),
    ({"row_offsets": torch.tensor([0, 2, 3], dtype=torch.int16)}, TypeError, r"row_offsets must be int32 or int64"),
    ({"cols": torch.tensor([[0, 1, 1]])}, ValueError, r"cols must be 1-D"),
    ({"cols": torch.tensor([0, 1])}, ValueError, r"cols must have one entry for each of the 3 blocks, got 2"),
    ({"row_offsets": torch.tensor([0, 2, 4])}, ValueError, r"row_offsets must .*end at the number of blocks 3"),
    ({"row_offsets": torch.tensor([1, 2, 3])}, ValueError, r"row_offsets must .*ascend from 0"),
    ({"row_offsets": torch.tensor([0, 4, 3])}, ValueError, r"row_offsets must .*ascend"),
    ({"row_offsets": torch.tensor([3])}, ValueError, r"row_offsets must"),
    ({"cols": torch.tensor([0, 2, 1])}, ValueError, r"cols must lie in 0\.\.1, got 0\.\.2"),
    ({"cols": torch.tensor([-1, 1, 1])}, ValueError, r"cols must lie in 0\.\.1, got -1\.\.1"),
    ({"cols": torch.tensor([1, 0, 1])}, ValueError, r"cols must ascend within each block row"),
    ({"cols": torch.tensor([1, 1, 1])}, ValueError, r"cols must ascend within each block row, without repeats"),
]


@pytest.mark.parametrize(("change", "error", "message"), FAULTS, ids=[message for _, _, message in FAULTS])
def test_layouts_that_are_refused(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    bk.BlockSparse(**GOOD)
    with pytest.raises(error) as raised:
        bk.BlockSparse(**{**GOOD, **change})
    assert type(raised.value) is error
    assert re.search(message, str(raised.value)), str(raised.value)


def test_conversions_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dense must be \(N, N\), got shape \(16, 32\)"):
        bk.BlockSparse.from_dense(torch.zeros(16, 32), 16)
    with pytest.raises(ValueError, match=r"block_size must be one of .* got 20"):
        bk.BlockSparse.from_dense(torch.zeros(40, 40), 20)
    with pytest.raises(ValueError, match="block_size must divide the number of neurons 40, got 16"):
        bk.BlockSparse.from_dense(torch.zeros(40, 40), 16)
    with pytest.raises(ValueError, match=r"blocks_per_row must be in 1\.\.4 .*got 5"):
        bk.BlockSparse.random(64, blocks_per_row=5, block_size=16)
    with pytest.raises(ValueError, match=r"sparse_bsr tensor, got layout torch.strided"):
        bk.BlockSparse.from_sparse_bsr(torch.zeros(16, 16))
    with pytest.raises(ValueError, match=r"square, got shape \(16, 32\)"):
        bk.BlockSparse.from_sparse_bsr(torch.ones(16, 32).to_sparse_bsr((16, 16)))
