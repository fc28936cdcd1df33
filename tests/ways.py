"""The ways an operation can be run here, and the one comparison of all of them with the float64 dense baseline."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import bio_kernels as bk
import pytest
import torch
from bio_kernels._backend import interpreting
from bio_kernels.testing import TOLERANCE, assert_close, generator
from torch import Tensor, nn


class Way(NamedTuple):
    device: str
    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}-{str(self.dtype)[6:]}"

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"


def _all_ways() -> list[Way]:
    found = [Way("cpu", "reference", dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    if importlib.util.find_spec("triton") and interpreting():
        found += [Way("cpu", "triton", dtype) for dtype in (torch.float32, torch.float16)]
    if torch.cuda.is_available():
        for backend in ("triton", "reference"):
            found += [Way("cuda", backend, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    return found


WAYS = _all_ways()
SINGLE = [way for way in WAYS if way.dtype == torch.float32]
WORST: dict[tuple[str, str, str], tuple[float, float]] = {}


def param(way: Way, *values: Any, slow: bool = False) -> Any:
    marks = [pytest.mark.gpu] if way.device == "cuda" else []
    marks += [pytest.mark.slow] if slow else []
    name = str(way) + "".join(f"-{'_'.join(map(str, v)) if isinstance(v, tuple) else v}" for v in values)
    return pytest.param(way, *values, marks=marks, id=name)


def every_way(single: bool = False) -> pytest.MarkDecorator:
    """parametrize("way"): each device and backend here, in each dtype, or in float32 only."""
    return pytest.mark.parametrize("way", [param(way) for way in (SINGLE if single else WAYS)])


def every_way_and(
    case: str, few: Sequence[Any], more: Sequence[Any] = (), single: bool = False
) -> pytest.MarkDecorator:
    """parametrize("way, <case>"): few and more cases each way; through the slow interpreter the latter are slow."""
    ways = SINGLE if single else WAYS
    listed = [param(way, value) for way in ways for value in few]
    listed += [param(way, value, slow=way.interpreted) for way in ways for value in more]
    return pytest.mark.parametrize(("way", case), listed)


def leaf(x: Any, way: Way) -> Any:
    """x rounded to the way's dtype on its device: a leaf with a gradient; a BlockSparse too. Layout is not kept."""
    if isinstance(x, bk.BlockSparse):
        blocks = nn.Parameter(x.blocks.detach().to(way.device, way.dtype, copy=True))
        return bk.BlockSparse(blocks, x.row_offsets.to(way.device), x.cols.to(way.device))
    if not isinstance(x, Tensor):
        return x
    if not x.is_floating_point():
        return x.to(way.device)
    return x.detach().to(way.device, way.dtype, copy=True).requires_grad_()


def exact(x: Any) -> Any:
    """The very values of x (rounded as they are) as float64 on the CPU: what the baseline is given."""
    return leaf(x, Way("cpu", "dense", torch.float64))


def gradient(x: Any) -> Tensor | None:
    grad = x.blocks.grad if isinstance(x, bk.BlockSparse) else x.grad
    # coalesced first: on a GPU to_dense() alone adds by atomics
    return grad.coalesce().to_dense() if grad is not None and grad.layout != torch.strided else grad


def values_of(x: Tensor | bk.BlockSparse) -> Tensor:
    """What is stored of a matrix: the tensor that its gradients are taken of."""
    return x.blocks if isinstance(x, bk.BlockSparse) else x


def differentiable(x: Any) -> bool:
    return isinstance(x, bk.BlockSparse) or (isinstance(x, Tensor) and x.requires_grad)


def outputs(result: Any) -> list[Tensor]:
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x.is_floating_point()]


def backward(result: Any, seed: int = 0) -> None:
    """Backpropagate the same random gradients, exact in every dtype, for the same shapes."""
    g = generator(seed)
    found = [x for x in outputs(result) if x.requires_grad]  # an empty batch may leave nothing to differentiate
    grads = [torch.randn(x.shape, generator=g).bfloat16().to(x.device, x.dtype) for x in found]
    torch.autograd.backward(found, grads)


def compare(operation: Callable[..., Any], way: Way, arguments: dict[str, Any], **options: Any) -> Any:
    """Outputs and gradients of operation by ``way`` on leaves agree with the dense baseline on their values in float64.

    Returns what ran by ``way``. The worst errors are kept in WORST.
    """
    ours = {name: leaf(x, way) for name, x in arguments.items()}
    return compare_as_is(operation, way, ours, **options)


def compare_as_is(operation: Callable[..., Any], way: Way, ours: dict[str, Any], **options: Any) -> Any:
    """``compare`` for arguments that are on the device already, with the layout they should have."""
    theirs = {name: exact(x) for name, x in ours.items()}
    for x in ours.values():
        if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf:
            x.retain_grad()
    result, expected = (
        operation(**ours, backend=way.backend, **options),
        operation(**theirs, backend="dense", **options),
    )
    forward = backwards = 0.0
    for a, b in zip(outputs(result), outputs(expected), strict=True):
        assert a.device.type == way.device
        forward = max(forward, assert_close(a, b, a.dtype, "output"))
    backward(result)
    backward(expected)
    for name, x in ours.items():
        if differentiable(x):
            grad, truth = gradient(x), gradient(theirs[name])
            assert grad is not None, f"{name} got no gradient"
            assert grad.dtype == (x.blocks if isinstance(x, bk.BlockSparse) else x).dtype
            truth = torch.zeros_like(grad, dtype=torch.float64) if truth is None else truth
            backwards = max(backwards, _gradient_close(grad, truth, name))
    if all(values_of(x).dtype == way.dtype for x in ours.values() if differentiable(x)):
        note(operation.__name__, way, forward, backwards)
    return result


def _gradient_close(grad: Tensor, truth: Tensor, name: str) -> float:
    """The error; where the true gradient is zero but for rounding (a softmax of one), a small one is right."""
    if truth.numel() and truth.abs().max() < 1e-12:
        assert grad.abs().max() <= 4 * TOLERANCE[grad.dtype], f"gradient of {name} should vanish, got {grad}"
        return 0.0
    return assert_close(grad, truth, grad.dtype, f"gradient of {name}")


def note(name: str, way: Way, forward: float, backwards: float = 0.0) -> None:
    key = (name, f"{way.device}-{way.backend}", str(way.dtype)[6:])
    old = WORST.get(key, (0.0, 0.0))
    WORST[key] = (max(old[0], forward), max(old[1], backwards))


def close(actual: Tensor, expected: Tensor, way: Way, what: str = "result") -> float:
    return assert_close(actual, expected, way.dtype, what)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, the sign of zero included; NaN equals NaN."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    as_bits = integers[a.element_size()] if a.is_floating_point() else a.dtype
    return torch.equal(a.detach().contiguous().view(as_bits), b.detach().contiguous().view(as_bits))
