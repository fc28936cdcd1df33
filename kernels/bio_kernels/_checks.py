"""What the operations refuse. Every message names the argument, what it got and what is allowed.

Types, shapes, dtypes and devices are checked by the public functions, while torch.compile traces too. Values (the
range of an index, the sign of a gate) are checked inside the operators, where they exist: always on a CPU, and on a
GPU, where looking costs a synchronisation, under BIO_KERNELS_CHECK=1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._backend import checking
from .block_sparse import BlockSparse

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)


def tensor(name: str, x: Any, shape: str, dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """x, if it is a strided tensor of one of these numbers of dimensions and dtypes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {shape}, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {x.layout}")
    if x.dim() not in dims:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(str(d)[6:] for d in dtypes)}, got {str(x.dtype)[6:]}")
    return x


def size(name: str, x: Tensor, shape: str, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} must be {shape} = {expected}, got shape {tuple(x.shape)} (nothing is broadcast)")


def same_device(**named: Tensor | BlockSparse | None) -> None:
    first = None
    for name, x in named.items():
        x = x.blocks if isinstance(x, BlockSparse) else x
        if x is None:
            continue
        if first is None:
            first = (name, x.device)
        elif x.device != first[1]:
            raise ValueError(f"{name} must be on the device of {first[0]}, {first[1]}, got {x.device}")


def same_precision(**named: Tensor | BlockSparse | None) -> None:
    """float64 goes with float64 only: nothing is rounded down in silence."""
    found = {
        name: (x.blocks if isinstance(x, BlockSparse) else x).dtype == torch.float64
        for name, x in named.items()
        if x is not None
    }
    if len(set(found.values())) > 1:
        double = ", ".join(name for name, is_double in found.items() if is_double)
        single = ", ".join(name for name, is_double in found.items() if not is_double)
        raise TypeError(f"{double} must not be float64 unless all are, got lower precision for {single}")


def integer(name: str, x: Any, low: int, high: int, meaning: str) -> None:
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    if not low <= x <= high:
        raise ValueError(f"{name} must be in {low}..{meaning}={high}, got {x}")


def number(name: str, x: Any, low: float = -math.inf) -> float:
    """x as a float, if it is a finite real number >= low."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not math.isfinite(x) or x < low:
        raise ValueError(f"{name} must be finite{f' and >= {low:g}' if low > -math.inf else ''}, got {x}")
    return float(x)


def square(name: str, x: Any) -> Tensor | BlockSparse:
    """A connection matrix: (N, N) tensor or BlockSparse."""
    if isinstance(x, BlockSparse):
        return x
    tensor(name, x, "(N, N)", (2,))
    if x.shape[0] != x.shape[1]:
        raise ValueError(f"{name} must be square, (N, N), got shape {tuple(x.shape)}")
    return x


def slots(idx: Any, count: Any, n: int) -> None:
    """idx (B, K) with 1 <= K <= n where each neuron may stand once, and count (B,) or None."""
    tensor("idx", idx, "(B, K)", (2,), INDICES)
    if not 1 <= idx.shape[1] <= n:
        raise ValueError(f"idx must be (B, K) with K in 1..N={n}, got shape {tuple(idx.shape)}")
    if count is not None:
        tensor("count", count, "(B,)", (1,), INDICES)
        size("count", count, "(B,)", (idx.shape[0],))


def writable(name: str, x: Tensor) -> None:
    """In place on an expanded tensor would write one value to many places."""
    if any(stride == 0 and length > 1 for stride, length in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"{name} must not be an expanded tensor: it is updated in place, got strides {x.stride()}")


def _has_values(x: Tensor) -> bool:
    return x.numel() > 0 and (x.is_cpu or checking())


def indices(idx: Tensor, n: int, count: Tensor | None = None, distinct: bool = False) -> None:
    """ValueError unless the indices in use lie in 0..n-1 (and differ within a sample) and count lies in 0..K."""
    if not _has_values(idx):
        return
    if count is not None:
        if int(count.min()) < 0 or int(count.max()) > idx.shape[1]:
            raise ValueError(f"count must be in 0..K={idx.shape[1]}, got {int(count.min())}..{int(count.max())}")
        # slots out of use take values that differ from all others, and from each other
        unused = torch.arange(idx.shape[1], device=idx.device)
        idx = torch.where(unused < count[:, None], idx, n + unused)
        low, high = int(idx.min()), int(idx.masked_fill(unused >= count[:, None], 0).max())
    else:
        low, high = (int(x) for x in idx.aminmax())
    if low < 0 or high >= n:
        raise ValueError(f"idx must be in 0..{n - 1}, got values from {low} to {high}")
    if distinct and bool((idx[:, 1:] <= idx[:, :-1]).any()) and bool((idx.sort(1).values.diff() == 0).any()):
        raise ValueError("idx must hold each neuron at most once within a sample, got a repeat")


def gates(gate: Tensor, count: Tensor | None) -> None:
    """ValueError if the gate of a slot in use is negative."""
    if _has_values(gate):
        negative = gate < 0
        if count is not None:
            negative &= torch.arange(gate.shape[1], device=gate.device) < count[:, None]
        if bool(negative.any()):
            raise ValueError(f"gate must be >= 0, got {float(gate[negative].min()):g}")


def finite(**named: Tensor) -> None:
    """Under BIO_KERNELS_CHECK=1: ValueError naming the first argument that holds a NaN, and how many."""
    for name, x in named.items():
        if checking() and bool(x.isnan().any()):
            raise ValueError(f"{name} holds {int(x.isnan().sum())} NaN of {x.numel()} values")


def values(
    idx: Tensor, n: int, count: Tensor | None = None, gate: Tensor | None = None, *, distinct: bool = False
) -> None:
    """The checks of values for the dense baseline, which is no operator; while it is traced there are no values."""
    if not torch.compiler.is_compiling():
        indices(idx, n, count, distinct)
        if gate is not None:
            gates(gate, count)
