"""Every fault is refused by name before anything changes: one record for each call, its exception and its message."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import make_inputs
from torch import Tensor

from tests.ways import SINGLE, Way, leaf, param, same_bits


class Fault(NamedTuple):
    operation: Callable[..., Any]
    change: dict[str, Callable[[Any], Any]]  # argument -> the wrong one made of the right one
    error: type[Exception]
    message: str


def set_to(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def with_entry(value: float, *where: int) -> Callable[[Tensor], Tensor]:
    def spoil(x: Tensor) -> Tensor:
        x = x.detach().clone()
        x[where] = value
        return x

    return spoil


def to(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda x: x.detach().to(dtype)


def narrowed(x: Tensor) -> Tensor:
    return x[..., :-1]


def sparse(x: Tensor) -> Tensor:
    return x.detach().to_sparse()


B, N, K, H, D = 2, 9, 4, 2, 3


def good(operation: Callable[..., Any], way: Way) -> dict[str, Any]:
    x = make_inputs(B, N, K, heads=H, head_width=D).to(way.dtype, way.device)
    count = torch.tensor([4, 2], device=way.device)
    return {
        bk.topk_gather: {"score": x.score, "table": x.table, "k": K},
        bk.sparse_attention: {
            "q": x.q, "k": x.k, "v": x.v, "idx": x.idx, "strength": x.strength, "gate": x.gate, "count": count,
        },
        bk.weighted_rows: {"table": x.strength, "idx": x.idx, "weight": x.gate},
        bk.update_strength_: {
            "strength": x.strength, "idx": x.idx, "pre": x.pre, "post": x.post, "eta": 0.1, "count": count,
        },
    }[operation]  # fmt: skip


TOPK, ATTENTION, ROWS, UPDATE = bk.topk_gather, bk.sparse_attention, bk.weighted_rows, bk.update_strength_
FAULTS = [
    Fault(TOPK, {"k": set_to(0)}, ValueError, r"k must be in 1\.\.N=9, got 0"),
    Fault(TOPK, {"k": set_to(-3)}, ValueError, r"k must be in 1\.\.N=9, got -3"),
    Fault(TOPK, {"k": set_to(10)}, ValueError, r"k must be in 1\.\.N=9, got 10"),
    Fault(TOPK, {"k": set_to(2.0)}, TypeError, r"k must be an int, got float"),
    Fault(TOPK, {"k": set_to(True)}, TypeError, r"k must be an int, got bool"),
    Fault(TOPK, {"score": lambda x: x.tolist()}, TypeError, r"score must be a torch.Tensor \(B, N\), got list"),
    Fault(TOPK, {"score": lambda x: x[0]}, ValueError, r"score must be \(B, N\), got shape \(9,\)"),
    Fault(TOPK, {"score": to(torch.int64)}, TypeError, r"score must be one of float32, .*got int64"),
    Fault(TOPK, {"score": to(torch.complex64)}, TypeError, r"score must be one of float32, .*got complex64"),
    Fault(TOPK, {"score": to(torch.float8_e4m3fn)}, TypeError, r"score must be one of .*got float8_e4m3fn"),
    Fault(TOPK, {"score": sparse}, TypeError, r"score must be a strided tensor, got layout torch.sparse_coo"),
    Fault(TOPK, {"score": lambda x: x[:, :0]}, ValueError, r"score must be \(B, N\) with N >= 1, got shape \(2, 0\)"),
    Fault(TOPK, {"table": lambda x: x[:8]}, ValueError, r"table must be .*\(9, 8\), got shape \(8, 8\).*broadcast"),
    Fault(TOPK, {"table": lambda x: x[None]}, ValueError, r"table must be .*\(2, 9, 8\), got shape \(1, 9, 8\)"),
    Fault(TOPK, {"table": lambda x: x[0]}, ValueError, r"table must be \(N, D\) or \(B, N, D\), got shape \(8,\)"),
    Fault(TOPK, {"table": lambda x: x.to("meta")}, ValueError, r"table must be on the device of score, .*got meta"),
    Fault(
        TOPK, {"table": lambda x: x.expand(2, 9, 8), "sparse_grad": set_to(True)}, ValueError, r"sparse_grad must be"
    ),
    Fault(TOPK, {"backend": set_to("cuda")}, ValueError, r"backend must be one of auto, triton, .*got 'cuda'"),
    Fault(ATTENTION, {"q": lambda x: x[0]}, ValueError, r"q must be \(B, H, K, Dh\), got shape \(2, 4, 3\)"),
    Fault(ATTENTION, {"q": lambda x: x.tolist()}, TypeError, r"q must be a torch.Tensor"),
    Fault(ATTENTION, {"k": narrowed}, ValueError, r"k must be .*\(2, 2, 4, 3\), got shape \(2, 2, 4, 2\)"),
    Fault(ATTENTION, {"v": lambda x: x[:1]}, ValueError, r"v must be .*got shape \(1, 2, 4, 3\).*broadcast"),
    Fault(ATTENTION, {"k": to(torch.float16)}, TypeError, r"k must be one of float32, got float16"),
    Fault(ATTENTION, {"v": to(torch.int32)}, TypeError, r"v must be one of float32, got int32"),
    Fault(
        ATTENTION,
        {x: lambda x: x[..., :0] for x in "qkv"},
        ValueError,
        r"q must be .*Dh >= 1, got shape \(2, 2, 4, 0\)",
    ),
    Fault(ATTENTION, {"idx": to(torch.float32)}, TypeError, r"idx must be one of int32, int64, got float32"),
    Fault(ATTENTION, {"idx": to(torch.int16)}, TypeError, r"idx must be one of int32, int64, got int16"),
    Fault(ATTENTION, {"idx": to(torch.bool)}, TypeError, r"idx must be one of int32, int64, got bool"),
    Fault(ATTENTION, {"idx": narrowed}, ValueError, r"idx must be \(B, K\) of q = \(2, 4\), got shape \(2, 3\)"),
    Fault(ATTENTION, {"idx": with_entry(9, 1, 0)}, ValueError, r"idx must be in 0\.\.8, got values from .* to 9"),
    Fault(ATTENTION, {"idx": with_entry(-1, 0, 3)}, ValueError, r"idx must be in 0\.\.8, got values from -1"),
    Fault(ATTENTION, {"idx": lambda x: x[:, [0, 0, 2, 3]]}, ValueError, r"idx must hold each neuron at most once"),
    Fault(
        ATTENTION,
        {"idx": lambda x: x[:, [0, 1, 2, 0]], "count": set_to(None)},
        ValueError,
        r"idx must hold each neuron",
    ),
    Fault(ATTENTION, {"strength": narrowed}, ValueError, r"strength must be square, \(N, N\), got shape \(9, 8\)"),
    Fault(ATTENTION, {"strength": lambda x: x[:3, :3]}, ValueError, r"idx must be \(B, K\) with K in 1\.\.N=3"),
    Fault(ATTENTION, {"strength": to(torch.float64)}, TypeError, r"strength must not be float64 unless all are"),
    Fault(ATTENTION, {"strength": sparse}, TypeError, r"strength must be a strided tensor, got layout"),
    Fault(ATTENTION, {"strength": lambda x: x.to("meta")}, ValueError, r"strength must be on the device of q"),
    Fault(ATTENTION, {"gate": narrowed}, ValueError, r"gate must be \(B, K\) = \(2, 4\), got shape \(2, 3\)"),
    Fault(ATTENTION, {"gate": with_entry(-0.5, 1, 1)}, ValueError, r"gate must be >= 0, got -0.5"),
    Fault(ATTENTION, {"gate": to(torch.bool)}, TypeError, r"gate must be one of float32, .*got bool"),
    Fault(ATTENTION, {"gate": to(torch.float64)}, TypeError, r"gate must not be float64 unless all are"),
    Fault(ATTENTION, {"count": with_entry(5, 0)}, ValueError, r"count must be in 0\.\.K=4, got 2\.\.5"),
    Fault(ATTENTION, {"count": with_entry(-1, 1)}, ValueError, r"count must be in 0\.\.K=4, got -1\.\.4"),
    Fault(ATTENTION, {"count": lambda x: x[:1]}, ValueError, r"count must be \(B,\) = \(2,\), got shape \(1,\)"),
    Fault(ATTENTION, {"count": to(torch.float32)}, TypeError, r"count must be one of int32, int64, got float32"),
    Fault(ATTENTION, {"scale": set_to(math.nan)}, ValueError, r"scale must be finite, got nan"),
    Fault(ATTENTION, {"scale": set_to("1")}, TypeError, r"scale must be a number, got str"),
    Fault(ROWS, {"table": lambda x: x[0]}, ValueError, r"table must be \(N, M\) or \(B, N, M\), got shape \(9,\)"),
    Fault(ROWS, {"table": lambda x: x.expand(3, 9, 9)}, ValueError, r"table must be \(B, N, M\) with B = 2 as idx"),
    Fault(ROWS, {"table": to(torch.int64)}, TypeError, r"table must be one of float32, .*got int64"),
    Fault(ROWS, {"table": lambda x: x[:, :0]}, ValueError, r"table and idx must hold rows, got shapes \(9, 0\)"),
    Fault(ROWS, {"table": to(torch.float64)}, TypeError, r"table must not be float64 unless all are"),
    Fault(ROWS, {"idx": with_entry(9, 1, 0)}, ValueError, r"idx must be in 0\.\.8, got values from .* to 9"),
    Fault(ROWS, {"idx": with_entry(-9, 1, 0)}, ValueError, r"idx must be in 0\.\.8, got values from -9"),
    Fault(ROWS, {"idx": to(torch.uint8)}, TypeError, r"idx must be one of int32, int64, got uint8"),
    Fault(ROWS, {"idx": lambda x: x[0]}, ValueError, r"idx must be \(B, K\), got shape \(4,\)"),
    Fault(ROWS, {"weight": narrowed}, ValueError, r"weight must be \(B, K\) as idx = \(2, 4\), got shape \(2, 3\)"),
    Fault(ROWS, {"weight": lambda x: x[:1]}, ValueError, r"weight must be .*nothing is broadcast"),
    Fault(ROWS, {"weight": lambda x: x.to("meta")}, ValueError, r"weight must be on the device of table"),
    Fault(UPDATE, {"strength": lambda x: x[:1].expand(9, 9)}, ValueError, r"strength must not be an expanded tensor"),
    Fault(UPDATE, {"strength": narrowed}, ValueError, r"strength must be square"),
    Fault(UPDATE, {"strength": lambda x: x.tolist()}, TypeError, r"strength must be a torch.Tensor"),
    Fault(UPDATE, {"strength": to(torch.int32)}, TypeError, r"strength must be one of float32, .*got int32"),
    Fault(UPDATE, {"idx": with_entry(12, 0, 0)}, ValueError, r"idx must be in 0\.\.8, got values from .* to 12"),
    Fault(UPDATE, {"idx": with_entry(-1, 0, 0)}, ValueError, r"idx must be in 0\.\.8, got values from -1"),
    Fault(UPDATE, {"idx": lambda x: x[:, [1, 1, 2, 3]]}, ValueError, r"idx must hold each neuron at most once"),
    Fault(UPDATE, {"idx": to(torch.float32)}, TypeError, r"idx must be one of int32, int64"),
    Fault(UPDATE, {"pre": narrowed}, ValueError, r"pre must be \(B, K\) as idx = \(2, 4\), got shape \(2, 3\)"),
    Fault(UPDATE, {"post": lambda x: x[0]}, ValueError, r"post must be \(B, K\), got shape \(4,\)"),
    Fault(UPDATE, {"post": to(torch.float64)}, TypeError, r"post must not be float64 unless all are"),
    Fault(UPDATE, {"count": with_entry(7, 0)}, ValueError, r"count must be in 0\.\.K=4, got 2\.\.7"),
    Fault(UPDATE, {"eta": set_to(math.inf)}, ValueError, r"eta must be finite, got inf"),
    Fault(UPDATE, {"eta": set_to(None)}, TypeError, r"eta must be a number, got NoneType"),
    Fault(UPDATE, {"decay": set_to(math.nan)}, ValueError, r"decay must be finite, got nan"),
    Fault(UPDATE, {"bound": set_to(-1.0)}, ValueError, r"bound must be finite and >= 0, got -1"),
    Fault(UPDATE, {"bound": set_to(math.inf)}, ValueError, r"bound must be finite and >= 0, got inf"),
    Fault(UPDATE, {"backend": set_to("Triton")}, ValueError, r"backend must be one of .*got 'Triton'"),
]

DENSE = Way("cpu", "dense", torch.float32)
READ_VALUES = re.compile(r"at most once|got values|>= 0, got -0\.5|count must be in")  # a GPU checks these on request


def expect(call: Callable[[], Any], fault: Fault) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)) as raised:
        call()
    assert type(raised.value) is fault.error, f"got {type(raised.value).__name__}: {raised.value}"
    assert re.search(fault.message, str(raised.value)), str(raised.value)


@pytest.mark.parametrize("way", [param(way) for way in [*SINGLE, DENSE]])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.operation.__name__}: {fault.message}")
def test_is_refused_and_nothing_changes(way: Way, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    if way.device == "cuda" and READ_VALUES.search(fault.message):
        monkeypatch.setenv("BIO_KERNELS_CHECK", "1")
    arguments = {"backend": way.backend, **good(fault.operation, way)}
    for name, change in fault.change.items():
        arguments[name] = change(arguments.get(name))
    before = {name: x.detach().clone() for name, x in arguments.items() if isinstance(x, Tensor) and not x.is_meta}
    expect(lambda: fault.operation(**arguments), fault)
    for name, x in before.items():
        if x.layout == torch.strided and x.dtype != torch.float8_e4m3fn and not x.is_complex():
            assert same_bits(arguments[name], x), f"{name} was changed"


@pytest.mark.parametrize("way", [param(way) for way in [*SINGLE, DENSE]])
@pytest.mark.parametrize("operation", [TOPK, ATTENTION, ROWS, UPDATE], ids=lambda f: f.__name__)
def test_the_arguments_that_the_faults_start_from_are_right(way: Way, operation: Callable[..., Any]) -> None:
    operation(**good(operation, way), backend=way.backend)


@pytest.mark.parametrize("way", [param(way) for way in SINGLE])
def test_nan_is_named_where_it_is_looked_for(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """BIO_KERNELS_CHECK=1: NaN that else would be seen in the result is refused, with the argument and how many."""
    monkeypatch.setenv("BIO_KERNELS_CHECK", "1")
    for operation, name in ((TOPK, "score"), (ATTENTION, "k"), (ROWS, "weight"), (UPDATE, "post")):
        arguments = good(operation, way)
        arguments[name].view(-1)[:2] = math.nan
        with pytest.raises(ValueError, match=rf"{name} holds 2 NaN of {arguments[name].numel()} values"):
            operation(**arguments, backend=way.backend)


@pytest.mark.parametrize("way", [param(way) for way in SINGLE])
def test_block_sparse_is_checked_alike(way: Way) -> None:
    strength = leaf(make_inputs(1, 32, 1, storage="block_sparse").strength, way)
    before = strength.blocks.detach().clone()
    idx = torch.tensor([[3, 32]], device=way.device)
    ones = torch.ones(1, 2, device=way.device)
    if way.device == "cpu":
        with pytest.raises(ValueError, match=r"idx must be in 0\.\.31, got values from 3 to 32"):
            bk.weighted_rows(strength, idx, ones, backend=way.backend)
        with pytest.raises(ValueError, match=r"idx must be in 0\.\.31"):
            bk.update_strength_(strength, idx, ones, ones, eta=1.0, backend=way.backend)
    with pytest.raises(TypeError, match="float64"):
        bk.update_strength_(strength, idx % 32, ones.double(), ones.double(), eta=1.0, backend="reference")
    assert same_bits(strength.blocks, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
def test_on_a_gpu_indices_out_of_range_are_masked_off(storage: str) -> None:
    """Nothing is read or written outside: what is out of range adds nothing, and gets no gradient."""
    x = make_inputs(2, 32, 4, storage=storage).to(torch.float32, "cuda")
    bad = torch.tensor([-1, 2**40, 32, -(2**62)], device="cuda").expand(2, 4)
    idx = torch.cat([x.idx, bad], 1)
    weight = torch.cat([x.gate, torch.ones(2, 4, device="cuda")], 1).requires_grad_()
    out = bk.weighted_rows(x.strength, idx, weight, backend="triton")
    torch.testing.assert_close(out, bk.weighted_rows(x.strength, x.idx, x.gate, backend="triton"))
    out.sum().backward()
    assert weight.grad is not None
    assert not weight.grad[:, 4:].any()
    q = torch.rand(2, 1, 8, 4, device="cuda")
    assert bk.sparse_attention(q, q, q, idx, x.strength, backend="triton").isfinite().all()
    bk.update_strength_(x.strength, idx, weight, weight, eta=0.1, backend="triton")
    torch.cuda.synchronize()
