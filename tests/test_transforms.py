"""What torch does to a function: differentiates it once, twice and forwards, casts and maps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import TOLERANCE, make_inputs, relative_error
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from tests.ways import Way, every_way, leaf, values_of

pytestmark = pytest.mark.default_memory
STORAGES = pytest.mark.parametrize("storage", ["dense", "block_sparse"])


def inputs(
    batch: int = 2, n: int = 16, k: int = 5, storage: str = "dense", dtype: torch.dtype = torch.float64, **more: Any
):
    return make_inputs(batch, n, k, storage=storage, heads=2, head_width=3, **more).to(dtype, grad=True)


def of_values(strength: Tensor | bk.BlockSparse, values: Tensor) -> Tensor | bk.BlockSparse:
    """The same matrix around other values, which stay what gradients are taken of."""
    if isinstance(strength, bk.BlockSparse):
        return bk.BlockSparse(values, strength.row_offsets, strength.cols)
    return values


def functions(x: Any) -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """Each operation as a function of the tensors it has gradients for."""
    count = torch.tensor([5, 2])

    def attention(q: Tensor, k: Tensor, v: Tensor, strength: Tensor, gate: Tensor) -> Tensor:
        return bk.sparse_attention(q, k, v, x.idx, of_values(x.strength, strength), gate=gate, count=count)

    return {
        "topk_gather": (lambda score, table: bk.topk_gather(score, table, 4)[::2], (x.score, x.table)),
        "sparse_attention": (attention, (x.q, x.k, x.v, values_of(x.strength), x.gate)),
        "weighted_rows": (
            lambda table, weight: bk.weighted_rows(of_values(x.strength, table), x.idx, weight),
            (values_of(x.strength), x.gate),
        ),
    }


NAMES = pytest.mark.parametrize("name", ["topk_gather", "sparse_attention", "weighted_rows"])


@NAMES
@STORAGES
def test_gradcheck(name: str, storage: str) -> None:
    function, arguments = functions(inputs(storage=storage))[name]
    assert gradcheck(function, arguments, fast_mode=storage == "block_sparse")


def test_gradgradcheck_of_topk_gather() -> None:
    x = inputs(3, 9, 4)
    assert gradgradcheck(lambda score, table: bk.topk_gather(score, table, 4)[::2], (x.score, x.table))
    per_sample = torch.randn(3, 9, 2, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda table: bk.topk_gather(x.score.detach(), table, 4).rows, (per_sample,))


@pytest.mark.parametrize("name", ["sparse_attention", "weighted_rows"])
def test_differentiating_twice_is_refused(name: str) -> None:
    function, arguments = functions(inputs())[name]
    grads = torch.autograd.grad(function(*arguments).square().sum(), arguments, create_graph=True)
    with pytest.raises(
        (RuntimeError, NotImplementedError), match=r"cannot differentiate .* only topk_gather has second derivatives"
    ):
        sum(grad.sum() for grad in grads).backward()  # type: ignore[union-attr]


@NAMES
def test_forward_mode_is_refused(name: str) -> None:
    function, arguments = functions(inputs())[name]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"forward|jvp"):
        function(*(forward_ad.make_dual(x.detach(), torch.ones_like(x)) for x in arguments))


@NAMES
def test_func_grad(name: str) -> None:
    function, arguments = functions(inputs())[name]

    def loss(*tensors: Tensor) -> Tensor:
        result = function(*tensors)
        return sum(x.sin().sum() for x in (result if isinstance(result, tuple) else (result,)))  # type: ignore[return-value]

    everything = tuple(range(len(arguments)))
    mapped = torch.func.grad(loss, everything)(*arguments)
    expected = torch.autograd.grad(loss(*arguments), arguments)
    assert all(torch.equal(a, b) for a, b in zip(mapped, expected, strict=True))


@NAMES
def test_vmap_is_an_error_and_not_a_wrong_number(name: str) -> None:
    function, arguments = functions(inputs())[name]
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(function)(*(torch.stack([x.detach(), 2 * x.detach()]) for x in arguments))


def test_vmap_of_the_update_is_an_error_and_not_a_wrong_number() -> None:
    x = inputs()
    strength = torch.stack([x.strength.detach()] * 2)
    before = strength.clone()

    def update(strength: Tensor, pre: Tensor) -> Tensor:
        return bk.update_strength_(strength, x.idx, pre, x.post, eta=0.1)  # type: ignore[return-value]

    with pytest.raises(RuntimeError, match="Batching rule"):
        torch.vmap(update)(strength, torch.stack([x.pre.detach()] * 2))
    assert torch.equal(strength, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_way(single=True)
def test_autocast_casts_q_k_v_and_sums_in_float32(way: Way, dtype: torch.dtype) -> None:
    if way.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    x = make_inputs(2, 40, 13)
    ours, plain = ({n: leaf(getattr(x, n), way) for n in ("q", "k", "v", "idx", "strength", "gate")} for _ in range(2))
    with torch.autocast(way.device, dtype=dtype):
        out = bk.sparse_attention(**ours, backend=way.backend)
        top = bk.topk_gather(leaf(x.score, way), leaf(x.table, way), 3, backend=way.backend)
    assert out.dtype == dtype
    assert top.rows.dtype == top.gate.dtype == torch.float32
    expected = bk.sparse_attention(**plain, backend=way.backend)
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for name in ("q", "k", "v", "strength", "gate"):
        grad, truth = ours[name].grad, plain[name].grad
        assert grad is not None
        assert truth is not None
        assert grad.dtype == torch.float32
        assert relative_error(grad, truth) <= 2 * TOLERANCE[dtype], name
