"""Finding blocks: in tables or by search, whichever is cheaper; and a layout that is taken on trust."""

from __future__ import annotations

import bio_kernels as bk
import pytest
import torch
from torch import nn

from tests.test_block_sparse import matrix


@pytest.mark.parametrize(("n", "stride", "rows"), [(32, 1, 2), (2048, 4, 8), (2048, 64, 16)])
def test_blocks_are_found_in_whichever_way_is_cheapest(n: int, stride: int, rows: int) -> None:
    """128 pairs are looked up in a table of all 2 ** 2 pairs of blocks, of the 8 ** 2 active ones, or searched for."""
    generator, tiles = torch.Generator().manual_seed(0), torch.arange(n // 16)
    cols = torch.stack([tiles, (tiles + 1) % len(tiles)], 1).sort(1).values.flatten()
    blocks = nn.Parameter(torch.randn(len(cols), 16, 16, generator=generator))
    strength = bk.BlockSparse(blocks, torch.arange(0, len(cols) + 1, 2), cols)
    idx = torch.arange(0, 32, 2).view(2, 8) * stride
    assert len((idx // 16).unique()) == rows
    activity = torch.rand(2, 8, generator=generator)
    dense = strength.to_dense().detach()
    expected = bk.update_strength_(dense.clone(), idx, activity, activity, eta=0.1, backend="dense")
    bk.update_strength_(strength, idx, activity, activity, eta=0.1, backend="reference")
    torch.testing.assert_close(strength.to_dense(), torch.where(dense != 0, expected, 0))
    assert not torch.equal(strength.to_dense(), dense)


def test_a_trusted_matrix_is_the_checked_one() -> None:
    dense, strength = matrix()
    again = bk.BlockSparse.trusted(strength.blocks.detach(), strength.row_offsets, strength.cols, strength.search_steps)
    assert torch.equal(again.to_dense(), dense)
    assert again.search_steps == strength.search_steps == int(strength.row_offsets.diff().max()).bit_length()
    assert not list(again.parameters())
