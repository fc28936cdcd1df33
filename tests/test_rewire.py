"""Structural plasticity against slow oracles: co-activity of blocks, rewiring at a fixed budget, optimizers in step."""

from __future__ import annotations

import re

import bio_kernels as bk
import pytest
import torch
from bio_kernels import rewire
from bio_kernels.testing import active_neurons, generator, make_inputs
from torch import Tensor

N, P = 160, 16
R = N // P


def patterns(batch: int = 6, k: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(seed)
    idx = active_neurons(batch, N, k, "clustered", seed)[:, torch.randperm(k, generator=g)]
    return idx, torch.rand(batch, k, generator=g), torch.randint(0, k + 1, (batch,), generator=g)


def some_matrix(blocks_per_row: int = 3, seed: int = 3) -> bk.BlockSparse:
    g = generator(seed)
    return bk.BlockSparse.random(N, blocks_per_row=blocks_per_row, block_size=P, generator=g, dtype=torch.float64)


def some_wanted(seed: int = 5) -> bk.CoActivity:
    """Values of which many are equal, so that ties are met; about a third are absent."""
    g = generator(seed)
    rows, cols = (torch.rand(R, R, generator=g) < 0.7).nonzero(as_tuple=True)
    return bk.CoActivity(rows, cols, torch.randint(1, 5, rows.shape, generator=g).double())


@pytest.mark.parametrize("with_count", [True, False])
@pytest.mark.parametrize("chunk", [1, 40, 2**22])
def test_co_activity_is_the_hebbian_term_of_each_block(with_count: bool, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr("bio_kernels.rewire._PAIRS", chunk)
    idx, gate, count = patterns()
    count = count if with_count else None
    found = bk.co_activity(idx, gate, count, N, P)
    expected = torch.zeros(R, R, dtype=torch.float64)
    for b in range(len(idx)):
        used = slice(None if count is None else int(count[b]))
        for i, x in zip(idx[b, used].tolist(), gate[b, used].tolist(), strict=True):
            for j, y in zip(idx[b, used].tolist(), gate[b, used].tolist(), strict=True):
                expected[i // P, j // P] += x * y
    assert expected.count_nonzero() < R * R, "some pairs were never active together"
    torch.testing.assert_close(torch.zeros_like(expected).index_put(found[:2], found.value), expected)
    keys = found.rows * R + found.cols
    assert bool((keys.diff() > 0).all())
    assert bool((found.value > 0).all())
    again = bk.co_activity(idx, gate, count, N, P)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_pairs_are_held_a_chunk_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr("bio_kernels.rewire._PAIRS", 8)
    assert rewire._chunks([4, 8, 9, 30, 31, 38]) == [(0, 2), (2, 3), (3, 4), (4, 6)], (
        "a sample of 21 pairs stands alone"
    )


def test_co_activity_is_what_plasticity_adds_to_a_block() -> None:
    idx, gate, count = patterns()
    gate = gate.double()
    strength = bk.BlockSparse.from_dense(torch.zeros(N, N, dtype=torch.float64), P, blocks_per_row=R)
    bk.update_strength_(strength, idx, gate, gate, eta=1.0 * len(idx), count=count)
    rows, cols, value = bk.co_activity(idx, gate, count, N, P)
    torch.testing.assert_close(strength.blocks.sum((1, 2)).view(R, R)[rows, cols], value)


def test_co_activity_of_nothing() -> None:
    idx, gate, count = patterns()
    for found in (bk.co_activity(idx[:0], gate[:0], None, N, P), bk.co_activity(idx, gate, count * 0, N, P)):
        assert [x.shape for x in found] == [(0,)] * 3
        matrix = some_matrix()
        before = matrix.to_dense()
        assert not bk.rewire_(matrix, found, max_new_per_row=3).fresh.any()
        assert torch.equal(matrix.to_dense(), before)


def slow_rewiring(
    matrix: bk.BlockSparse, wanted: bk.CoActivity, new: int, margin: float
) -> list[dict[int, int | None]]:
    """For each block row: {column: slot it had before, None if it is new}."""
    want = torch.zeros(R, R, dtype=torch.float64)
    want[wanted.rows, wanted.cols] = wanted.value
    norm = matrix.blocks.detach().square().sum((1, 2)).sqrt()
    found = []
    for r in range(R):
        slots = range(int(matrix.row_offsets[r]), int(matrix.row_offsets[r + 1]))
        stored: dict[int, int | None] = {int(matrix.cols[z]): z for z in slots}
        use = {c: float(want[r, c] * max(1.0, float(norm[z] / norm.mean()))) for c, z in stored.items()}
        drop = sorted(use, key=lambda c: (use[c], c))
        grow = sorted((c for c in range(R) if c not in stored), key=lambda c: (-float(want[r, c]), c))
        for old, c in list(zip(drop, grow, strict=False))[:new]:
            if float(want[r, c]) > (1 + margin) * use[old]:
                del stored[old]
                stored[c] = None
        found.append(dict(sorted(stored.items())))
    return found


@pytest.mark.parametrize("new", [0, 1, 2, 99])
@pytest.mark.parametrize("layout", ["regular", "irregular", "full", "zeros"])
def test_rewiring_against_a_slow_oracle(layout: str, new: int) -> None:
    matrix = some_matrix(R if layout == "full" else 3)
    if layout == "irregular":
        matrix = make_inputs(1, N, 1, storage="block_sparse", block_size=P).strength  # type: ignore[assignment]
        assert len(set(matrix.row_offsets.diff().tolist())) > 2
    if layout == "zeros":
        torch.nn.init.zeros_(matrix.blocks)
    wanted, old = some_wanted(), matrix.blocks.detach().clone()
    expected = slow_rewiring(matrix, wanted, new, 0.1)
    parameter, offsets, address = matrix.blocks, matrix.row_offsets.clone(), matrix.blocks.data_ptr()
    rewiring = bk.rewire_(matrix, wanted, max_new_per_row=new)
    assert matrix.blocks is parameter
    assert matrix.blocks.data_ptr() == address
    assert torch.equal(matrix.row_offsets, offsets)
    assert matrix.cols.tolist() == [c for row in expected for c in row]
    assert rewiring.fresh.tolist() == [z is None for row in expected for z in row.values()]
    assert sorted(rewiring.source.tolist()) == list(range(len(old))), "a permutation"
    for z, source in enumerate(z for row in expected for z in row.values()):
        assert torch.equal(matrix.blocks[z], torch.zeros(P, P).double() if source is None else old[source])
        assert source is None or source == rewiring.source[z]
    assert bool(rewiring.fresh.any()) == (new > 0 and layout != "full")
    bk.BlockSparse(matrix.blocks, matrix.row_offsets, matrix.cols)  # still a layout


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_once_is_enough(seed: int, margin: float) -> None:
    """With the same statistics nothing changes any more, also where ties and fresh blocks are."""
    matrix = some_matrix(4, seed)
    with torch.no_grad():  # blocks of very different strength
        matrix.blocks *= torch.rand(len(matrix.blocks), 1, 1, generator=generator(seed)) ** 4
    wanted = some_wanted(seed)
    assert bk.rewire_(matrix, wanted, max_new_per_row=R, margin=margin).fresh.any()
    before, cols = matrix.blocks.detach().clone(), matrix.cols.clone()
    again = bk.rewire_(matrix, wanted, max_new_per_row=R, margin=margin)
    assert not again.fresh.any()
    assert torch.equal(again.source, torch.arange(len(before)))
    assert torch.equal(matrix.blocks, before)
    assert torch.equal(matrix.cols, cols)


def test_a_margin_keeps_blocks_that_are_nearly_as_good() -> None:
    dense = torch.zeros(48, 48)
    dense[:, :16] = 1.0
    wanted = bk.CoActivity(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]), torch.tensor([1.0, 1.2, 1.2]))
    for margin, column in ((0.19, 1), (0.21, 0)):
        matrix = bk.BlockSparse.from_dense(dense, 16)
        bk.rewire_(matrix, wanted, max_new_per_row=1, margin=margin)
        assert matrix.cols.tolist() == [column, 0, 0]


def test_repeats_of_wanted_add() -> None:
    wanted, matrix, other = some_wanted(), some_matrix(), some_matrix()
    twice = tuple(torch.cat([x, x.flip(0)]) for x in wanted._replace(value=wanted.value / 2))
    bk.rewire_(matrix, wanted, max_new_per_row=2)
    bk.rewire_(other, twice, max_new_per_row=2)  # type: ignore[arg-type]
    assert torch.equal(matrix.cols, other.cols)


def test_only_dropped_blocks_change_an_output() -> None:
    matrix, wanted = some_matrix(), some_wanted()
    before, old_cols = matrix.to_dense(), matrix.cols.clone()
    rewiring = bk.rewire_(matrix, wanted, max_new_per_row=2)
    dropped = before - matrix.to_dense()
    where = dropped.reshape(R, P, R, P).abs().sum((1, 3)).nonzero()
    slots = rewiring.source[rewiring.fresh]
    assert sorted(map(tuple, where.tolist())) == sorted((int(z) // 3, int(old_cols[z])) for z in slots)
    idx = torch.arange(N)[None]
    out = bk.weighted_rows(matrix, idx, torch.ones(1, N, dtype=torch.float64))
    torch.testing.assert_close(out, (before - dropped).sum(0, keepdim=True))


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sparse adam": lambda p: torch.optim.SparseAdam(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_follow(name: str) -> None:
    """After rewiring, blocks that stayed train on as if nothing had been, and fresh ones as if they were new."""
    matrix, still = some_matrix(), some_matrix()
    optimizers = [OPTIMIZERS[name]([m.blocks]) for m in (matrix, still)]
    gradients = torch.randn(2, *matrix.blocks.shape, generator=generator(1), dtype=torch.float64)

    def step(which: int, m: bk.BlockSparse, gradient: Tensor) -> None:
        m.blocks.grad = gradient.to_sparse(1) if name == "sparse adam" else gradient.clone()
        optimizers[which].step()
        m.blocks.grad = None

    for which, m in enumerate((matrix, still)):
        step(which, m, gradients[0])
    rewiring = bk.rewire_(matrix, some_wanted(), max_new_per_row=2)
    bk.rewire_optimizer_(optimizers[0], matrix.blocks, rewiring)
    kept, source = ~rewiring.fresh, rewiring.source[~rewiring.fresh]
    assert 0 < int(kept.sum()) < len(kept)
    state, before = optimizers[0].state[matrix.blocks], optimizers[1].state[still.blocks]
    for key, value in before.items():
        if isinstance(value, Tensor) and value.shape == matrix.blocks.shape:
            assert torch.equal(state[key][kept], value[source]), key
            assert not state[key][rewiring.fresh].any(), key
        else:
            assert state[key] == value, key
    step(1, still, gradients[1])
    step(0, matrix, gradients[1][rewiring.source])
    assert torch.equal(matrix.blocks[kept], still.blocks[source])


def test_a_gradient_moves_along_and_a_fresh_optimizer_has_nothing_to_move() -> None:
    matrix = some_matrix()
    gradient = torch.randn(matrix.blocks.shape, dtype=torch.float64)
    matrix.blocks.grad = gradient.clone()
    rewiring = bk.rewire_(matrix, some_wanted(), max_new_per_row=2)
    expected = gradient[rewiring.source].masked_fill(rewiring.fresh[:, None, None], 0)
    assert torch.equal(matrix.blocks.grad, expected)
    bk.rewire_optimizer_(torch.optim.AdamW([matrix.blocks]), matrix.blocks, rewiring)


def test_a_sparse_gradient_moves_along() -> None:
    """That of a pool in groups: of some blocks, in any order, one of them twice."""
    matrix = some_matrix()
    slots = torch.tensor([7, 2, 7, 11, 0, 20, 4])
    values = torch.randn(len(slots), P, P, dtype=torch.float64)
    matrix.blocks.grad = torch.sparse_coo_tensor(slots[None], values, matrix.blocks.shape)
    gradient = matrix.blocks.grad.to_dense()
    rewiring = bk.rewire_(matrix, some_wanted(), max_new_per_row=2)
    expected = gradient[rewiring.source].masked_fill(rewiring.fresh[:, None, None], 0)
    assert matrix.blocks.grad.is_sparse
    assert torch.equal(matrix.blocks.grad.to_dense(), expected)
    assert not torch.equal(expected, gradient)


def test_what_is_refused_changes_nothing() -> None:
    matrix, wanted = some_matrix(), some_wanted()
    before, cols = matrix.blocks.detach().clone(), matrix.cols.clone()
    faults = [
        (dict(max_new_per_row=-1), ValueError, r"max_new_per_row must be in 0\.\..*got -1"),
        (dict(max_new_per_row=1.0), TypeError, r"max_new_per_row must be an int, got float"),
        (dict(margin=-0.1), ValueError, r"margin must be finite and >= 0, got -0.1"),
        (dict(wanted=wanted._replace(value=[1.0])), TypeError, r"wanted.value must be a torch.Tensor \(E,\), got list"),
        (dict(matrix=before), TypeError, r"matrix must be a BlockSparse, got Tensor"),
        (dict(wanted=wanted._replace(cols=wanted.cols + 1)), ValueError, r"wanted.cols must be in 0\.\.9, got 1\.\.10"),
        (
            dict(wanted=wanted._replace(rows=wanted.rows[:-1])),
            ValueError,
            r"wanted.rows must be \(E,\) as wanted.value",
        ),
        (
            dict(wanted=wanted._replace(rows=wanted.rows.double())),
            TypeError,
            r"wanted.rows must be one of int32, int64",
        ),
        (dict(wanted=wanted._replace(value=-wanted.value)), ValueError, r"wanted.value must be finite and >= 0"),
        (dict(wanted=wanted._replace(value=wanted.value / 0)), ValueError, r"wanted.value must be finite and >= 0"),
    ]
    for change, error, message in faults:
        with pytest.raises(error) as raised:
            bk.rewire_(**{"matrix": matrix, "wanted": wanted, "max_new_per_row": 2, **change})
        assert re.search(message, str(raised.value)), str(raised.value)
    assert torch.equal(matrix.blocks, before)
    assert torch.equal(matrix.cols, cols)


def test_faults_of_co_activity_and_of_optimizers() -> None:
    idx, gate, count = patterns()
    good = {"idx": idx, "gate": gate, "count": count, "n": N, "block_size": P}
    faults = [
        (dict(idx=idx + N), ValueError, r"idx must be in 0\.\.159"),
        (dict(idx=idx * 0, count=None), ValueError, r"idx must hold each neuron at most once"),
        (dict(gate=gate[:, 1:]), ValueError, r"gate must be \(B, K\) as idx"),
        (dict(count=count + 9), ValueError, r"count must be in 0\.\.K=9"),
        (dict(n=161), ValueError, r"block_size must divide the number of neurons 161, got 16"),
        (dict(block_size=20), ValueError, r"block_size must be one of"),
    ]
    for change, error, message in faults:
        with pytest.raises(error) as raised:
            bk.co_activity(**{**good, **change})
        assert re.search(message, str(raised.value)), str(raised.value)
    matrix = some_matrix()
    rewiring = bk.rewire_(matrix, some_wanted(), max_new_per_row=2)
    with pytest.raises(ValueError, match="parameter must be one of the optimizer's"):
        bk.rewire_optimizer_(torch.optim.SGD([torch.zeros(1)], lr=0.1), matrix.blocks, rewiring)
    adafactor = torch.optim.Adafactor([matrix.blocks])
    matrix.blocks.grad = torch.ones_like(matrix.blocks)
    adafactor.step()
    with pytest.raises(ValueError, match="optimizer state 'row_var' must have the parameter's shape"):
        bk.rewire_optimizer_(adafactor, matrix.blocks, rewiring)
