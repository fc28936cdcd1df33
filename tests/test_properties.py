"""Random shapes, layouts and values: parity with the dense baseline, and what must hold whatever the numbers are."""

from __future__ import annotations

from typing import Any

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ways import SINGLE, Way, close, compare_as_is, exact, leaf, param, same_bits

REFERENCE = Way("cpu", "reference", torch.float64)
EACH = pytest.mark.parametrize(
    "way", [param(way) for way in [REFERENCE, *(way for way in SINGLE if way.backend == "triton")]]
)


def examples(way: Way) -> int:
    return 8 if way.interpreted else 40


@st.composite
def shapes(draw: st.DrawFn, storage: bool = False) -> dict[str, Any]:
    """batch, n and k of any size up to 40; a block-sparse pool is a multiple of 16."""
    kind = draw(st.sampled_from(["dense", "block_sparse"])) if storage else "dense"
    n = 16 * draw(st.integers(1, 4)) if kind == "block_sparse" else draw(st.integers(1, 40))
    return {
        "batch": draw(st.integers(0, 4)), "n": n, "k": draw(st.integers(1, min(n, 24))), "storage": kind,
        "width": draw(st.integers(1, 9)), "heads": draw(st.integers(1, 3)), "head_width": draw(st.integers(1, 9)),
        "seed": draw(st.integers(0, 999)),
    }  # fmt: skip


def strided(x: Tensor, kind: int) -> Tensor:
    """The same values and gradient, laid out in one of five ways; x itself stays the leaf."""
    if kind == 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2:
        return torch.stack([x, x + 1], -1)[..., 0]
    if kind == 3:
        return torch.cat([x.new_zeros(1, *x.shape[1:]), x])[1:]
    if kind == 4:
        return x.flip(-1).flip(-1)
    return x


def run(way: Way, operation: Any, named: dict[str, Any], layouts: list[int], **options: Any) -> None:
    ours = {name: leaf(x, way) for name, x in named.items()}
    ours = {
        name: strided(x, layouts[i % len(layouts)]) if isinstance(x, Tensor) and x.is_floating_point() else x
        for i, (name, x) in enumerate(ours.items())
    }
    compare_as_is(operation, way, ours, **options)


LAYOUTS = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@EACH
def test_topk_gather(way: Way) -> None:
    @settings(max_examples=examples(way))
    @given(shapes(), LAYOUTS, st.booleans())
    def check(shape: dict[str, Any], layouts: list[int], rounded: bool) -> None:
        x = make_inputs(**shape)
        score = x.score.round() if rounded else x.score  # rounded: many ties
        run(way, bk.topk_gather, {"score": score, "table": x.table}, layouts, k=shape["k"])
        top = bk.topk_gather(leaf(score, way), leaf(x.table, way), shape["k"], backend=way.backend)
        assert (top.idx.diff() > 0).all()
        rest = leaf(score, way).detach().scatter(1, top.idx, -torch.inf)
        assert (top.gate.amin(1) >= rest.amax(1)).all() if shape["batch"] else True
        dense = bk.topk_gather(exact(score), exact(x.table), shape["k"], backend="dense")
        assert torch.equal(top.idx, dense.idx)

    check()


@EACH
def test_sparse_attention(way: Way) -> None:
    @settings(max_examples=examples(way))
    @given(shapes(storage=True), LAYOUTS, st.booleans(), st.booleans(), st.booleans())
    def check(shape: dict[str, Any], layouts: list[int], gated: bool, partial: bool, some_silent: bool) -> None:
        x = make_inputs(**shape)
        gate = x.gate * (x.gate > 0.4) if some_silent else x.gate
        count = torch.arange(shape["batch"]) % (shape["k"] + 1) if partial else None
        named = {"q": x.q, "k": x.k, "v": x.v, "idx": x.idx, "strength": x.strength}
        named |= {"gate": gate} if gated else {}
        named |= {} if count is None else {"count": count}
        run(way, bk.sparse_attention, named, layouts)
        out = bk.sparse_attention(**{name: leaf(t, way) for name, t in named.items()}, backend=way.backend)
        if out.numel():  # a weighted mean of what is sent, or nothing
            assert out.abs().max() <= x.v.abs().max() * 1.0001

    check()


@EACH
def test_weighted_rows(way: Way) -> None:
    @settings(max_examples=examples(way))
    @given(shapes(storage=True), LAYOUTS, st.booleans(), st.booleans())
    def check(shape: dict[str, Any], layouts: list[int], repeated: bool, per_sample: bool) -> None:
        x = make_inputs(**shape)
        idx = x.idx % 3 % shape["n"] if repeated else x.idx
        table = x.strength
        if per_sample and isinstance(table, Tensor):
            table = (
                torch.stack([table * (b + 1) for b in range(shape["batch"])]) if shape["batch"] else table[None, :][:0]
            )
        run(way, bk.weighted_rows, {"table": table, "idx": idx, "weight": x.gate}, layouts)
        table, weight = leaf(table, way), leaf(x.gate, way)
        once, twice = (bk.weighted_rows(table, idx, factor * weight, backend=way.backend) for factor in (1, 2))
        assert same_bits(2 * once, twice), "linear in the weights, exactly for a power of two"

    check()


@EACH
def test_update_strength(way: Way) -> None:
    @settings(max_examples=examples(way))
    @given(shapes(storage=True), st.floats(-1, 1), st.sampled_from([0.0, 1.0, 0.3]), st.sampled_from([None, 0.0, 0.5]))
    def check(shape: dict[str, Any], eta: float, decay: float, bound: float | None) -> None:
        x = make_inputs(**shape)
        ours = {name: leaf(getattr(x, name), way) for name in ("strength", "idx", "pre", "post")}
        theirs = {name: exact(t) for name, t in ours.items()}
        rule: dict[str, Any] = {"eta": eta, "decay": decay, "bound": bound}
        bk.update_strength_(**ours, **rule, backend=way.backend)
        bk.update_strength_(**theirs, **rule, backend="dense")
        after, truth = (
            s.to_dense() if isinstance(s, bk.BlockSparse) else s for s in (ours["strength"], theirs["strength"])
        )
        close(after, truth, way)

    check()


@EACH
def test_samples_do_not_see_each_other(way: Way) -> None:
    """A sample's output is the same bits alone and in a batch."""
    x = make_inputs(5, 32, 7, storage="block_sparse")
    a: dict[str, Any] = {name: leaf(value, way) for name, value in x.__dict__.items()}

    def outputs(one: slice) -> list[Tensor]:
        idx, options = a["idx"][one], {"backend": way.backend}
        top = bk.topk_gather(a["score"][one], a["table"], 7, **options)
        out = bk.sparse_attention(
            a["q"][one], a["k"][one], a["v"][one], idx, a["strength"], gate=a["gate"][one], **options
        )
        return [*top, out, bk.weighted_rows(a["strength"], idx, a["pre"][one], **options)]

    together = outputs(slice(None))
    for b in range(5):
        alone = outputs(slice(b, b + 1))
        if way.backend == "triton":
            assert all(same_bits(one, all_[b : b + 1]) for one, all_ in zip(alone, together, strict=True))
        else:
            assert all(torch.allclose(one, all_[b : b + 1]) for one, all_ in zip(alone, together, strict=True))
