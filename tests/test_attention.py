"""sparse_attention: parity with the dense baseline, silence, partial counts, infinities, and what cannot matter."""

from __future__ import annotations

import math
from typing import Any

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import TOLERANCE, assert_close, generator, make_inputs, relative_error
from torch import Tensor

from tests.ways import Way, backward, close, compare, compare_as_is, every_way, every_way_and, exact, leaf, same_bits

FEW = [  # (B, N, K, H, Dh)
    (3, 7, 1, 1, 1),
    (1, 1, 1, 2, 4),
    (2, 13, 13, 3, 5),
    (0, 13, 3, 2, 4),
    (2, 300, 127, 2, 16),
]
MORE = [(3, 127, 127, 2, 7), (1, 300, 300, 1, 33), (2, 600, 257, 2, 64), (1, 128, 128, 4, 128), (4, 1000, 64, 4, 32)]


def arguments(batch: int, n: int, k: int, heads: int = 2, width: int = 4, **options: Any) -> dict[str, Any]:
    """q, k, v, idx, strength and gate of one seeded shape; idx in no order."""
    x = make_inputs(batch, n, k, heads=heads, head_width=width, **options)
    shuffle = torch.randperm(k, generator=generator(7))
    return {"q": x.q, "k": x.k, "v": x.v, "idx": x.idx[:, shuffle], "strength": x.strength, "gate": x.gate}


def run(way: Way, x: dict[str, Any], **options: Any) -> Tensor:
    return bk.sparse_attention(**x, backend=way.backend, **options)


def garbage(x: dict[str, Any], count: Tensor) -> dict[str, Any]:
    """NaN and indices out of range in the slots that are not in use."""
    unused = torch.arange(x["idx"].shape[1]) >= count[:, None]
    spoilt = {name: x[name].masked_fill(unused[:, None, :, None], math.nan) for name in ("q", "k", "v")}
    idx = x["idx"].masked_fill(unused, 2**31 - 1)
    return {**x, **spoilt, "idx": idx, "gate": x["gate"].masked_fill(unused, math.nan)}


@every_way_and("case", FEW, MORE)
def test_equals_dense(way: Way, case: tuple[int, ...]) -> None:
    out = compare(bk.sparse_attention, way, arguments(*case))
    assert out.dtype == way.dtype


@every_way_and("case", [(2, 16, 5), (3, 96, 40)], [(2, 256, 127), (1, 512, 300)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_block_sparse_equals_dense(way: Way, case: tuple[int, ...], block_size: int) -> None:
    batch, n, k = case
    if n % block_size:
        n = block_size
    compare(bk.sparse_attention, way, arguments(batch, n, k, storage="block_sparse", block_size=block_size))


@every_way()
@pytest.mark.parametrize("without", ["gate", "strength", "both"])
def test_optional_arguments(way: Way, without: str) -> None:
    x = arguments(2, 40, 13)
    for name in ("gate", "strength") if without == "both" else (without,):
        del x[name]
    compare(bk.sparse_attention, way, x)


@every_way_and("case", [(4, 40, 13)], [(4, 40, 300), (4, 512, 127)])
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
def test_partial_counts_read_nothing_else(way: Way, case: tuple[int, ...], storage: str) -> None:
    """Slots from count on hold NaN and indices out of range; their outputs and gradients are zero, the rest right."""
    batch, n, k = case
    n = max(48, (max(n, k) + 15) // 16 * 16)
    count = torch.tensor([0, 1, k // 2, k])
    x = {**garbage(arguments(batch, n, k, storage=storage), count), "count": count}
    ours = {name: leaf(value, way) for name, value in x.items()}
    out = compare_as_is(bk.sparse_attention, way, ours)
    for b, used in enumerate(count.tolist()):
        assert not out[b, :, used:].any()
        for name in ("q", "k", "v"):
            assert not ours[name].grad[b, :, used:].any(), f"gradient of {name} in unused slots"
        assert not ours["gate"].grad[b, used:].any()


@every_way_and("dtype", [torch.int32, torch.int64], single=True)
def test_index_dtypes(way: Way, dtype: torch.dtype) -> None:
    x = arguments(3, 32, 5)
    compare(bk.sparse_attention, way, {**x, "idx": x["idx"].to(dtype), "count": torch.tensor([0, 3, 5], dtype=dtype)})


@every_way()
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
def test_a_silent_neuron_can_wake_up(way: Way, storage: str) -> None:
    """gate 0: nothing is sent, no gradient but the gate's own, which is the finite one of the formula."""
    x = arguments(2, 48, 13, storage=storage)
    x["gate"][:, ::3] = 0
    ours = {name: leaf(value, way) for name, value in x.items()}
    compare_as_is(bk.sparse_attention, way, ours)
    grad = ours["gate"].grad[:, ::3]
    assert grad.isfinite().all()
    assert (grad != 0).all()
    assert not ours["k"].grad[:, :, ::3].any()
    assert not ours["v"].grad[:, :, ::3].any()


@every_way()
@pytest.mark.parametrize("reason", ["gates", "strength", "both"])
def test_where_no_sender_speaks_all_is_zero(way: Way, reason: str) -> None:
    x = arguments(2, 16, 5)
    if reason in ("gates", "both"):
        x["gate"] = torch.zeros_like(x["gate"])
    if reason in ("strength", "both"):
        x["strength"] = torch.full_like(x["strength"], -math.inf)
    ours = {name: leaf(value, way) for name, value in x.items()}
    out = run(way, ours)
    out.sum().backward()
    assert not out.any()
    for name in ("q", "k", "v", "strength", "gate"):
        assert not ours[name].grad.any(), f"the gradient of {name} is {ours[name].grad}"


@every_way()
def test_one_receiver_of_many_hears_nobody(way: Way) -> None:
    """All connections to one neuron are -inf: its output is zero, the others are as if it were not there."""
    x = arguments(1, 9, 9)
    x["strength"][:, 4] = -math.inf
    x["strength"][2, 5:8] = -math.inf
    ours = {name: leaf(value, way) for name, value in x.items()}
    out = compare_as_is(bk.sparse_attention, way, ours)
    slot = int((x["idx"][0] == 4).nonzero())
    assert not out[0, :, slot].any()
    assert out.abs().sum() > 0
    assert all(ours[name].grad.isfinite().all() for name in ("q", "k", "v", "strength", "gate"))


@every_way(single=True)
@pytest.mark.parametrize("name", ["k", "v", "strength"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_silent_sender_is_not_heard_whatever_it_holds(way: Way, name: str, value: float) -> None:
    """0 times infinity is not sent: outputs and the gradients of those who speak are those without the silent one."""
    x = arguments(1, 16, 5)
    x["gate"][0, 2] = 0
    clean = {key: leaf(v, way) for key, v in x.items()}
    if name == "strength":
        x[name][x["idx"][0, 2]] = value
    else:
        x[name][0, :, 2] = value
    ours = {key: leaf(v, way) for key, v in x.items()}
    expected, out = run(way, clean), run(way, ours)
    kept = [0, 1, 3, 4]
    assert same_bits(out[:, :, kept], expected[:, :, kept])
    out[:, :, kept].sum().backward()
    expected[:, :, kept].sum().backward()
    for key in ("q", "k", "v"):
        close(ours[key].grad[:, :, kept], clean[key].grad[:, :, kept].double(), way, f"gradient of {key}")


@every_way()
@pytest.mark.parametrize("silent", [False, True], ids=["one speaks", "all silent"])
def test_a_silent_sender_with_a_huge_score(way: Way, silent: bool) -> None:
    """exp would overflow for the sender of gate 0: it is left out, and the outputs stay those of the others."""
    x = arguments(1, 16, 5)
    x["strength"][x["idx"][0, 2]] = 2000.0
    x["gate"][0, 2] = 0
    if silent:
        x["gate"].zero_()
    else:
        x["strength"][x["idx"][0, 2], x["idx"][0]] = 2000.0
    ours = {key: leaf(v, way) for key, v in x.items()}
    out = run(way, ours)
    out.sum().backward()
    without = {key: v.detach()[:, [0, 1, 3, 4]] if key in ("idx", "gate") else v.detach() for key, v in ours.items()}
    without.update({key: ours[key].detach()[:, :, [0, 1, 3, 4]] for key in ("q", "k", "v")})
    expected = run(way._replace(backend="dense"), {key: exact(v) for key, v in without.items()})
    close(out[:, :, [0, 1, 3, 4]], expected, way)
    for key in ("q", "k", "v", "strength"):
        assert ours[key].grad.isfinite().all(), f"gradient of {key}"


@every_way()
def test_large_scores_neither_overflow_nor_vanish(way: Way) -> None:
    """At 1000 a float32 score is known to 1000 * 2**-24 only, and so is the logarithm of a weight."""
    x = arguments(2, 16, 7)
    x["strength"] = torch.where(torch.rand(16, 16, generator=generator(3)) < 0.5, 1000.0, -1000.0).double()
    ours = {name: leaf(value, way) for name, value in x.items()}
    theirs = {name: exact(value) for name, value in ours.items()}
    out, expected = run(way, ours), run(way._replace(backend="dense"), theirs)
    backward(out)
    backward(expected)
    allowed = max(TOLERANCE[way.dtype], 0.0 if way.dtype == torch.float64 else 5e-4)
    assert relative_error(out, expected) <= allowed
    for name in ("q", "k", "v", "strength", "gate"):
        assert relative_error(ours[name].grad, theirs[name].grad) <= allowed, f"gradient of {name}"


@every_way(single=True)
@pytest.mark.parametrize("name", ["q", "k", "v", "strength", "gate"])
def test_nan_is_seen(way: Way, name: str) -> None:
    """A NaN in what is read comes out, and is not turned into a number."""
    x = arguments(1, 9, 5)
    target = x[name] if name != "strength" else x["strength"]
    target[(x["idx"][0, 1], x["idx"][0, 1]) if name == "strength" else (0, 1) if name == "gate" else (0, 0, 1)] = (
        math.nan
    )
    out = run(way, {key: leaf(v, way) for key, v in x.items()})
    assert out[0, 0, 1].isnan().any()


@every_way()
def test_by_hand(way: Way) -> None:
    """Two neurons, q = 0: weights are gate_j exp(strength[sender j, receiver i]); ln 3 against 0 is 3 to 1."""
    q = torch.zeros(1, 1, 2, 1, device=way.device, dtype=way.dtype)
    v = torch.tensor([[[[8.0], [16.0]]]], device=way.device, dtype=way.dtype)
    strength = torch.zeros(3, 3, device=way.device, dtype=way.dtype)
    strength[0, 2] = math.log(3)
    idx = torch.tensor([[0, 2]], device=way.device)
    out = bk.sparse_attention(q, q, v, idx, strength, backend=way.backend)
    assert_close(out[0, 0, :, 0], torch.tensor([12.0, 10.0]).double(), way.dtype)
    gate = torch.tensor([[1.0, 3.0]], device=way.device, dtype=way.dtype)
    out = bk.sparse_attention(q, q, v, idx, strength, gate=gate, backend=way.backend)
    assert_close(out[0, 0, :, 0], torch.tensor([14.0, 12.0]).double(), way.dtype)


@every_way(single=True)
def test_the_order_of_slots_does_not_matter(way: Way) -> None:
    x = {name: leaf(value, way).detach() for name, value in arguments(2, 40, 13).items()}
    order = torch.randperm(13, generator=generator(5)).to(way.device)
    moved = {name: value[:, order] if value.dim() == 2 else value[:, :, order] for name, value in x.items()}
    moved["strength"] = x["strength"]
    close(run(way, moved), run(way, x)[:, :, order].double(), way)


@every_way(single=True)
def test_scale(way: Way) -> None:
    x = arguments(2, 16, 5, width=9)
    for scale in (0.0, -1.5, 3):
        compare(bk.sparse_attention, way, x, scale=scale)
    ours = {name: leaf(value, way).detach() for name, value in x.items()}
    assert same_bits(run(way, ours), run(way, ours, scale=9**-0.5))


@every_way(single=True)
@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_layouts(way: Way, layout: str) -> None:
    """(B, K, H, Dh) seen as (B, H, K, Dh), as projections leave it; one head for all; a transposed matrix."""
    x = {name: leaf(value, way).detach() for name, value in arguments(3, 16, 5, heads=2).items()}
    for name in ("q", "k", "v"):
        if layout == "transposed":
            x[name] = x[name].transpose(1, 2).contiguous().requires_grad_().transpose(1, 2)
        else:
            x[name] = x[name][:1, :1].clone().requires_grad_().expand(3, 2, 5, 4)
    x["strength"] = x["strength"].t().contiguous().requires_grad_().t()
    x["gate"] = x["gate"][:, :1].clone().requires_grad_().expand(3, 5)
    x["idx"] = x["idx"].t().contiguous().t()
    count = torch.tensor([[4, 9], [0, 9], [5, 9]], device=way.device)[:, 0]
    x["count"] = count if layout == "transposed" else count[:1].clone().expand(3)
    compare_as_is(bk.sparse_attention, way, x)


@every_way(single=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_matrix_and_gates_of_another_dtype(way: Way, dtype: torch.dtype) -> None:
    if way.interpreted and dtype == torch.bfloat16:
        x = {name: leaf(v, way) for name, v in arguments(1, 16, 5).items()}
        with pytest.raises(RuntimeError, match="bfloat16"):
            run(way, {**x, "strength": x["strength"].bfloat16()})
        return
    x = arguments(2, 16, 5)
    ours = {name: leaf(value, way) for name, value in x.items()}
    ours["strength"] = leaf(x["strength"], way._replace(dtype=dtype))
    ours["gate"] = leaf(x["gate"], way._replace(dtype=dtype))
    assert compare_as_is(bk.sparse_attention, way, ours).dtype == way.dtype


@every_way()
@pytest.mark.parametrize("partial", [False, True], ids=["all slots", "count"])
def test_sparse_grad_holds_the_same_sum(way: Way, partial: bool) -> None:
    x = arguments(3, 16, 5)
    if partial:
        x["count"] = torch.tensor([0, 5, 2])
        x = garbage(x, x["count"])
    ours = {name: leaf(value, way) for name, value in x.items()}
    compare_as_is(bk.sparse_attention, way, ours, sparse_grad=True)
    assert ours["strength"].grad.layout == torch.sparse_coo


@every_way(single=True)
def test_only_what_is_asked_for_gets_a_gradient(way: Way) -> None:
    for wanted in ("q", "v", "strength", "gate"):
        x = {name: leaf(value, way) for name, value in arguments(2, 16, 5).items()}
        x = {name: v if name == wanted or not v.is_floating_point() else v.detach() for name, v in x.items()}
        run(way, x).sum().backward()
        assert [name for name, v in x.items() if v.grad is not None] == [wanted]
