"""The Hebbian memory alone: it finds what came after a cue, in parallel as step by step, and keeps its cells."""

from __future__ import annotations

import pytest
import torch

from biohama import HebbianMemory


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_hebbian_memory_finds_what_came_after():
    part, codes = HebbianMemory(32, 256, 8), torch.randn(5, 32)
    a, b, c, d, e = codes
    address = part(torch.stack([a, b, c, d, e, c, a]).unsqueeze(0))[0]
    assert address[5].argmax() == 3, "after c came d"
    assert address[6].argmax() == 1, "after a came b"
    assert address[5, 3] > 0.5
    assert (address.triu(1) == 0).all()
    assert address[0].sum() == 0, "nothing has come yet"
    assert address.sum(-1).max() <= 1


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_hebbian_parallel_and_step_by_step(tied):
    part, x = HebbianMemory(16, 64, 6, tied=tied).double(), torch.randn(3, 12, 16, dtype=torch.float64)
    trace = part.start(3, 20)
    for t in range(12):
        if t:
            part.write_(trace, t, x[:, t - 1])
        torch.testing.assert_close(part.read(trace, x[:, t])[:, :12], part(x)[:, t], rtol=0, atol=1e-12)
    assert (part.to_question is None) is tied
    rows = part.cue_rows(x, question=True)
    assert ((rows > 0).sum(-1) == 6).all()
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(3, 12, dtype=torch.float64))
    index, value = part.cue(x, question=True)
    assert rows.gather(-1, index).equal(value)
    assert part.cue_rows(x).equal(rows) is tied
    for active in (0, 64):
        with pytest.raises(ValueError, match=f"cue_active must be in 1..d_cue-1=63, got {active}"):
            HebbianMemory(16, 64, active)


def test_a_cue_keeps_its_cells_and_their_gradients_also_below_zero():
    part, x = HebbianMemory(2, 6, 3).double(), torch.eye(2, dtype=torch.float64)
    drives = torch.tensor([[9.0, 5, 3, 2, 0, -1], [-9.0, -8, -6, -7, -5, -9]], dtype=torch.float64)
    part.to_cue.weight = torch.nn.Parameter(drives.T.clone())
    rows = part.cue_rows(x)
    expected = torch.tensor([[7.0, 3, 1, 0, 0, 0], [0, 0, 2, 1, 3, 0]], dtype=torch.float64)
    torch.testing.assert_close(rows, expected / expected.norm(dim=1, keepdim=True))
    (gradient,) = torch.autograd.grad(rows[:, 2].sum(), part.to_cue.weight)
    assert ((gradient.T != 0).sum(1) == 4).all(), "three cells and the threshold"
