"""Operators that torch sees as one opaque node while it traces or transforms, and that are plain functions otherwise.

Going through torch's dispatcher costs more than a small operation does, and the first call of a torch.library.custom_op
imports torch._dynamo, and that Triton: so operators are defined with torch.library.Library, and called directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._backend import on_its_device
from ._index import alone

_LIBRARY = torch.library.Library("bio_kernels", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)


def transformed() -> bool:
    """Whether something traces or transforms what runs now: torch.compile, torch.export, torch.func, dual numbers."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _traced(args: Iterable[Any]) -> bool:
    """Whether these arguments are seen by a tracer or a function transform, or hold no values."""
    return transformed() or any(isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta) for x in args)


class Operator:
    """A function registered as ``torch.ops.bio_kernels.<name>``, called directly where nothing traces."""

    def __init__(self, body: Callable[..., Any], mutates: tuple[str, ...] = ()) -> None:
        self.name, self.body = body.__name__, body
        _LIBRARY.define(self.name + torch.library.infer_schema(body, mutates_args=mutates))
        _LIBRARY.impl(self.name, self._dispatched, "CompositeExplicitAutograd")
        self.packet = getattr(torch.ops.bio_kernels, self.name)

    def __call__(self, *args: Any) -> Any:
        return self.packet(*args) if _traced(args) else on_its_device(self.body, *args)

    def _dispatched(self, *args: Any) -> Any:
        with alone():
            return on_its_device(self.body, *args)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        torch.library.register_fake(f"bio_kernels::{self.name}", fake, lib=_LIBRARY)
