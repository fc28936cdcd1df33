"""What a benchmark is made of: a shape, those who compete, and the inputs they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bio_kernels import BlockSparse
from torch import Tensor

Inputs = dict[str, Any]  # argument name -> tensor or BlockSparse; "grad" holds the gradients of the outputs


@dataclass(frozen=True)
class Spec:
    """One row of the table. batch B, n N, k K, width D or M, heads H; direction: forward, backward, both or update."""

    batch: int
    n: int = 4096
    k: int = 128
    direction: str = "both"
    width: int = 256
    heads: int = 8
    dtype: torch.dtype = torch.float32
    distribution: str = "uniform"
    storage: str = "dense"
    compiled: bool = False  # whether torch.compile takes part: compiling every shape would take most of the time

    @property
    def inputs(self) -> Spec:
        """The same row without its direction: what the inputs depend on."""
        return replace(self, direction="both")

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B{self.batch}-N{self.n}-K{self.k}-W{self.width}"
        return "-".join([sizes, dtype, self.distribution, self.storage, self.direction])


@dataclass(frozen=True)
class Contestant:
    """A way to compute the operation: ``run(inputs)`` returns tensors, ``leaves`` name what gets gradients."""

    name: str
    run: Callable[[Inputs], tuple[Tensor, ...]]
    leaves: tuple[str, ...] = ()
    directions: tuple[str, ...] = ("forward", "backward", "both", "update")
    deterministic: bool = False  # whether a repeat must give the same bits
    waits: bool = False  # whether it waits for the GPU, and so cannot be captured in a CUDA graph


@dataclass
class Case:
    """All that one row needs. ``sets`` are inputs of the same shape, used in turn so that none stays in cache."""

    op: str
    spec: Spec
    sets: list[Inputs]
    ours: Contestant
    peers: list[Contestant]
    truth: Callable[[], tuple[list[Tensor], dict[str, Tensor]]]  # float64 outputs, and gradients by name
    bytes_moved: int
    flops: int
    canonical: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda out: out  # brings peers into one order
    gradients: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda grads: grads  # brings them into truth's form
    graphs: bool = True  # on a GPU also as CUDA graphs, each of which keeps the memory of a call
    not_run: dict[str, str] = field(default_factory=dict)  # peer -> why it takes no part
    fixed: dict[str, float] = field(default_factory=dict)  # peer -> seconds that were measured apart, and scaled
    notes: list[str] = field(default_factory=list)
    slack: float = 1.0  # factor on the tolerance table where many operations follow each other


def leaf(x: Tensor | BlockSparse) -> Tensor:
    """The tensor in which the gradient of x arrives."""
    return x.blocks if isinstance(x, BlockSparse) else x


def leaves(contestant: Contestant, inputs: Inputs) -> list[Tensor]:
    return [leaf(inputs[name]) for name in contestant.leaves]


def in_double(x: Any) -> Any:
    """x as float64 leaves of its own: what the truth is computed from."""
    if isinstance(x, BlockSparse):
        return BlockSparse(torch.nn.Parameter(x.blocks.detach().double()), x.row_offsets, x.cols)
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().to(torch.float64, copy=True).requires_grad_(x.requires_grad)
    return x


def clone_inputs(inputs: Inputs) -> Inputs:
    """A copy whose tensors may be changed in place."""
    copy = {}
    for name, x in inputs.items():
        if isinstance(x, BlockSparse):
            copy[name] = BlockSparse(torch.nn.Parameter(x.blocks.detach().clone()), x.row_offsets, x.cols)
        elif isinstance(x, Tensor):
            copy[name] = x.detach().clone()
        else:
            copy[name] = x
    return copy
