"""What the tuning steps try: experimental kernels are right, and replaced constants take effect and are put back."""

from __future__ import annotations

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import generator, make_inputs

pytest.importorskip("triton")

from benchmarks.gpu import experiments, tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (300, 13), (1000, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_radix_select(n: int, k: int, dtype: torch.dtype) -> None:
    """Ties go to the lowest index, NaN is greatest, -0.0 equals 0.0: as in topk_gather."""
    score = torch.randn(3, n, generator=generator(n)).to(dtype)
    score[1] = 0.5
    score[1, ::2] = 0.0
    score[1, ::3] = -0.0
    score[2, n // 2] = torch.nan
    expected = bk.topk_gather(score, torch.zeros(n, 1), k, backend="reference")
    gate, idx = experiments.radix_select(score.to(DEVICE), k)
    assert torch.equal(idx.cpu(), expected.idx)
    assert torch.equal(gate.cpu().nan_to_num(9.0), expected.gate.nan_to_num(9.0))


def test_sums_by_atomics() -> None:
    x = make_inputs(5, 16, 6, kind="zipf")
    idx, delta = x.idx.to(DEVICE), torch.randn(5, 6, 6, generator=generator(1)).to(DEVICE)
    owner, atomics = torch.zeros(16, 16, device=DEVICE), torch.zeros(16, 16, device=DEVICE)
    tables.add_pairs(owner, delta, idx)
    experiments.atomic_add_pairs(atomics, delta, idx)
    torch.testing.assert_close(atomics, owner)
    assert owner.any()
    values = torch.randn(5, 6, 3, generator=generator(2)).to(DEVICE)
    torch.testing.assert_close(experiments.atomic_sum_rows(idx, values, 16), tables.sum_rows(idx, values, 16))


def test_constants_are_replaced_for_a_while() -> None:
    select = tables.FILES["select"]
    before = select.WHOLE
    with tables.constants(select_WHOLE=256):
        assert select._chunk(300, 4) != max(128, 512), "a row of 300 is now longer than one chunk"
    assert before == select.WHOLE
    with pytest.raises(AttributeError, match="NOTHING"), tables.constants(select_NOTHING=1):
        pass


@pytest.mark.parametrize("table", ["FORWARD", "ROWS", "COLUMNS"])
def test_a_tile_reaches_the_launch(table: str) -> None:
    q = torch.empty(2, 4, 128, 32, device=DEVICE, dtype=torch.float16)
    file, name = tables.TABLES[table]
    entries = getattr(tables.FILES[file], name)
    shape = tables.FILES["attention"].launch_shape
    shipped = tables.shipped_tile(table, 2, 128, 32)
    assert shape(entries, q)[1]["BLOCK_M"] == shipped[0]
    kept = dict(entries)
    with tables.attention_tile(table, (16, 64, 2, 3)):
        got = shape(entries, q)[1]
        assert (got["BLOCK_M"], got["BLOCK_N"], got["num_warps"], got["num_stages"]) == (16, 64, 2, 3)
    assert entries == kept
