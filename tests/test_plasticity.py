"""update_strength_: the Hebbian rule with forgetting, in place, on co-active pairs and on nothing else."""

from __future__ import annotations

import math
from typing import Any

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import active_neurons, assert_close, generator, make_inputs
from torch import Tensor

from tests.ways import Way, close, every_way, every_way_and, exact, leaf, note, same_bits

FEW = [(3, 7, 1), (1, 1, 1), (2, 13, 13), (0, 13, 3), (3, 127, 13)]  # (B, N, K)
MORE = [(2, 300, 127), (1, 300, 300), (9, 64, 32)]
RULES = {
    "hebb": {"eta": 0.25},
    "oja": {"eta": 0.1, "decay": 1.0},
    "bounded": {"eta": 0.5, "decay": 0.3, "bound": 0.7},
    "unlearn": {"eta": -0.1, "decay": -0.5, "bound": 0.0},
}


def arguments(batch: int, n: int, k: int, **options: Any) -> dict[str, Any]:
    x = make_inputs(batch, n, k, **options)
    shuffle = torch.randperm(k, generator=generator(7))
    return {"strength": x.strength, "idx": x.idx[:, shuffle], "pre": x.pre, "post": x.post}


def values(strength: Tensor | bk.BlockSparse) -> Tensor:
    return strength.to_dense() if isinstance(strength, bk.BlockSparse) else strength


def co_active(idx: Tensor, n: int, count: Tensor | None = None) -> Tensor:
    pairs = torch.zeros(n, n, dtype=torch.bool)
    for b, row in enumerate(idx.tolist()):
        used = row if count is None else row[: int(count[b])]
        for p in used:
            pairs[p, used] = True
    return pairs


def check(way: Way, x: dict[str, Any], **rule: Any) -> Tensor:
    """Update by ``way`` and by the dense baseline; they agree, and pairs not active together keep their bits."""
    ours = {name: leaf(value, way) for name, value in x.items()}
    theirs = {name: exact(value) for name, value in ours.items()}
    before = values(ours["strength"]).detach().clone()
    returned = bk.update_strength_(**ours, **rule, backend=way.backend)
    assert returned is ours["strength"]
    bk.update_strength_(**theirs, **rule, backend="dense")
    after = values(ours["strength"]).detach()
    note("update_strength_", way, assert_close(after, values(theirs["strength"]), way.dtype, "strength"))
    idle = ~co_active(x["idx"], before.shape[0], x.get("count")).to(way.device)
    assert same_bits(after[idle], before[idle]), "pairs that were not active together changed"
    return after


@every_way_and("case", FEW, MORE)
@pytest.mark.parametrize("rule", RULES)
def test_equals_dense(way: Way, case: tuple[int, ...], rule: str) -> None:
    check(way, arguments(*case), **RULES[rule])


@every_way_and("case", [(2, 16, 5, 16), (3, 96, 40, 32)], [(2, 256, 127, 64), (4, 256, 64, 128)])
@pytest.mark.parametrize("rule", ["hebb", "bounded"])
def test_block_sparse_equals_dense(way: Way, case: tuple[int, ...], rule: str) -> None:
    batch, n, k, block_size = case
    check(way, arguments(batch, n, k, storage="block_sparse", block_size=block_size), **RULES[rule])


@every_way()
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
def test_partial_counts_read_nothing_else(way: Way, storage: str) -> None:
    x = arguments(4, 48, 7, storage=storage)
    count = torch.tensor([0, 1, 4, 7])
    unused = torch.arange(7) >= count[:, None]
    x = {**x, "idx": x["idx"].masked_fill(unused, -5), "count": count}
    x.update({name: x[name].masked_fill(unused, math.nan) for name in ("pre", "post")})
    assert check(way, x, **RULES["bounded"]).isfinite().all()


@every_way()
def test_by_hand(way: Way) -> None:
    """Neurons 0 and 2, pre (1, 2), post (3, 4), eta 0.5: strength[p, q] += 0.5 pre_p post_q; Oja takes post_q^2 off."""
    strength = torch.zeros(3, 3, device=way.device, dtype=way.dtype)
    idx = torch.tensor([[0, 2]], device=way.device)
    pre = torch.tensor([[1.0, 2]], device=way.device, dtype=way.dtype)
    post = torch.tensor([[3.0, 4]], device=way.device, dtype=way.dtype)
    bk.update_strength_(strength, idx, pre, post, eta=0.5, backend=way.backend)
    assert strength.tolist() == [[1.5, 0, 2], [0, 0, 0], [3, 0, 4]]
    bk.update_strength_(strength, idx, pre, post, eta=0.5, decay=1.0, bound=20.0, backend=way.backend)
    assert strength.tolist() == [[-3.75, 0, -12], [0, 0, 0], [-7.5, 0, -20]]


@every_way()
def test_the_old_strength_is_the_one_before_all_samples(way: Way) -> None:
    """The same pair in every sample: forgetting is computed from the strength before the step, not along it."""
    batch = 16
    strength = torch.full((4, 4), 2.0, device=way.device, dtype=way.dtype)
    idx = torch.tensor([[1, 3]] * batch, device=way.device)
    ones = torch.ones(batch, 2, device=way.device, dtype=way.dtype)
    bk.update_strength_(strength, idx, ones, ones, eta=0.5, decay=1.0, backend=way.backend)
    assert strength[1].tolist() == [2, 1.5, 2, 1.5]


@every_way()
def test_only_pairs_active_together_are_clamped(way: Way) -> None:
    strength = torch.full((4, 4), -9.0, device=way.device, dtype=way.dtype)
    idx, ones = torch.tensor([[0, 1]], device=way.device), torch.ones(1, 2, device=way.device, dtype=way.dtype)
    bk.update_strength_(strength, idx, ones, ones, eta=0.0, bound=1.0, backend=way.backend)
    assert strength.tolist() == [[-1, -1, -9, -9], [-1, -1, -9, -9], [-9] * 4, [-9] * 4]


@every_way()
def test_blocks_that_are_not_stored_stay_zero(way: Way) -> None:
    dense = torch.zeros(32, 32, device=way.device, dtype=way.dtype)
    dense[:16, 16:] = 1
    strength = bk.BlockSparse.from_dense(dense, 16)
    idx, ones = torch.tensor([[3, 20]], device=way.device), torch.ones(1, 2, device=way.device, dtype=way.dtype)
    bk.update_strength_(strength, idx, ones, ones, eta=1.0, backend=way.backend)
    dense[3, 20] = 2
    assert torch.equal(strength.to_dense(), dense)


@every_way()
def test_small_changes_survive_in_16_bits(way: Way) -> None:
    """Each of 64 changes alone would be lost to rounding; their sum is taken in float32 and rounded once."""
    batch = 64
    strength = torch.ones(2, 2, device=way.device, dtype=way.dtype)
    idx = torch.tensor([[0, 1]] * batch, device=way.device)
    pre = torch.full((batch, 2), 2.0**-7, device=way.device, dtype=way.dtype)
    bk.update_strength_(strength, idx, pre, torch.ones_like(pre), eta=8.0, backend=way.backend)
    assert strength.tolist() == [[1.0625] * 2] * 2


@every_way()
@pytest.mark.parametrize("rule", ["hebb", "bounded"])
def test_nan_and_infinity_are_seen(way: Way, rule: str) -> None:
    strength = torch.zeros(4, 4, device=way.device, dtype=way.dtype)
    idx = torch.tensor([[0, 1]], device=way.device)
    pre = torch.tensor([[math.nan, 1.0]], device=way.device, dtype=way.dtype)
    bk.update_strength_(strength, idx, pre, torch.ones_like(pre), **RULES[rule], backend=way.backend)
    assert strength[0, :2].isnan().all()
    assert strength[1:].isfinite().all()
    assert strength[:, 2:].isfinite().all()


@every_way_and("dtype", [torch.int32, torch.int64], single=True)
def test_index_dtypes(way: Way, dtype: torch.dtype) -> None:
    x = arguments(3, 32, 5, storage="block_sparse")
    check(way, {**x, "idx": x["idx"].to(dtype), "count": torch.tensor([5, 0, 2], dtype=dtype)}, eta=0.1)


@every_way()
@pytest.mark.parametrize("kind", ["zipf", "clustered"])
def test_hot_neurons(way: Way, kind: str) -> None:
    x = arguments(24, 40, 8)
    check(way, {**x, "idx": active_neurons(24, 40, 8, kind)}, eta=0.1, decay=1.0)


@every_way()
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_a_strided_matrix_is_updated_where_it_lies(way: Way, layout: str) -> None:
    x = {name: leaf(value, way).detach() for name, value in arguments(2, 16, 5).items()}
    whole = torch.zeros(16, 32, device=way.device, dtype=way.dtype)
    view = whole[:, :16].t() if layout == "transposed" else whole[:, ::2]
    view.copy_(x["strength"])
    untouched = whole[:, 16:].clone() if layout == "transposed" else whole[:, 1::2].clone()
    assert bk.update_strength_(**{**x, "strength": view}, eta=0.3, decay=0.5, backend=way.backend) is view
    bk.update_strength_(**x, eta=0.3, decay=0.5, backend=way.backend)
    assert same_bits(view, x["strength"])
    assert torch.equal(whole[:, 16:] if layout == "transposed" else whole[:, 1::2], untouched)


@every_way(single=True)
def test_strided_activities(way: Way) -> None:
    x = arguments(6, 16, 5)
    ours = {name: leaf(value, way).detach() for name, value in x.items()}
    expected = bk.update_strength_(**{**ours, "strength": ours["strength"].clone()}, eta=0.3, backend=way.backend)
    before = ours["strength"].clone()
    for name in ("idx", "pre", "post"):
        ours[name] = ours[name].t().contiguous().t()
    assert same_bits(bk.update_strength_(**ours, eta=0.3, backend=way.backend), expected)
    count = torch.tensor([5, 0, 3, 1, 4, 2], device=way.device)
    ours["strength"] = before.clone()
    expected = bk.update_strength_(**{**ours, "strength": before}, eta=0.3, count=count, backend=way.backend)
    strided = torch.stack([count, count + 9], 1)[:, 0]
    assert same_bits(bk.update_strength_(**ours, eta=0.3, count=strided, backend=way.backend), expected)


@every_way(single=True)
def test_mixed_dtypes(way: Way) -> None:
    x = arguments(3, 16, 5)
    for half in ("strength", "pre", "post"):
        ours = {name: leaf(v, way._replace(dtype=torch.float16) if name == half else way) for name, v in x.items()}
        theirs = {name: exact(v) for name, v in ours.items()}
        bk.update_strength_(**ours, eta=0.1, decay=1.0, backend=way.backend)
        bk.update_strength_(**theirs, eta=0.1, decay=1.0, backend="dense")
        assert_close(ours["strength"], theirs["strength"], ours["strength"].dtype)


@every_way(single=True)
def test_no_gradient_and_a_new_version(way: Way) -> None:
    """A leaf that requires gradients is updated, and a graph that saved it before notices."""
    x = {name: leaf(value, way) for name, value in arguments(2, 16, 5).items()}
    product = x["strength"].square().sum()
    bk.update_strength_(**x, eta=0.1, backend=way.backend)
    assert x["strength"].is_leaf
    assert x["strength"].requires_grad
    assert x["strength"].grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@every_way(single=True)
def test_twice_is_not_once(way: Way) -> None:
    """Two steps from the same start differ from one: nothing is kept between calls."""
    x = {name: leaf(value, way).detach() for name, value in arguments(2, 16, 5).items()}
    once = bk.update_strength_(**{**x, "strength": x["strength"].clone()}, eta=0.1, backend=way.backend)
    twice = bk.update_strength_(**{**x, "strength": once.clone()}, eta=0.1, backend=way.backend)
    close(twice - x["strength"], 2 * (once - x["strength"]).double(), way)
