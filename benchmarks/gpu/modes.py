"""What torch does with the operations on a GPU: CUDA-graph capture and replay, torch.compile, autocast."""

from __future__ import annotations

from typing import Any

import torch
from bio_kernels import BlockSparse
from bio_kernels.testing import TOLERANCE, assert_close, relative_error
from torch import Tensor

from ..case import in_double, leaf
from ..measure import captured
from . import parity
from .determinism import OPERATIONS, STORAGES, arguments, inputs_for
from .journal import LeftOut, Row
from .setting import Rows, Setting, same_bits, short

BATCH = 32


def _run(operation: str, x: dict[str, Any], backend: str = "triton") -> parity.Results:
    run, _, leaves = OPERATIONS[operation]
    return parity.outputs_and_gradients(lambda a: run(a, backend), x, leaves)


def _fill(x: dict[str, Any], values: dict[str, Any]) -> None:
    """Puts other numbers and other indices into the tensors of x; the layout of a block-sparse matrix stays."""
    with torch.no_grad():
        for name, target in x.items():
            if isinstance(target, BlockSparse):
                target.blocks.normal_(generator=torch.Generator(target.blocks.device).manual_seed(3))
            elif isinstance(target, Tensor):
                target.copy_(values[name])


def replay(setting: Setting, operation: str, storage: str, dtype: torch.dtype) -> Row:
    """A replay reads what its inputs hold then, indices included, and gives the bits of a plain call."""
    if not setting.cuda:
        raise LeftOut("a CPU has no CUDA graphs")
    x = arguments(inputs_for(setting, storage, 0, BATCH), operation, setting, dtype)
    graph, held = captured(lambda: _run(operation, x))
    _fill(x, arguments(inputs_for(setting, storage, 1, BATCH), operation, setting, dtype))
    matrix = leaf(x["strength"]) if operation == "update_strength_" else None
    before = None if matrix is None else matrix.detach().clone()
    graph.replay()
    replayed = {name: value.clone() for name, value in held.items()}
    if matrix is not None and before is not None:
        with torch.no_grad():
            matrix.copy_(before)
    plain = _run(operation, x)
    differ = [name for name in plain if not same_bits(plain[name], replayed[name])]
    assert not differ, f"a replay differs from a plain call in {', '.join(differ)}"
    return {"compared": sorted(plain)}


def compiled(setting: Setting, operation: str, storage: str, dtype: torch.dtype) -> Row:
    """torch.compile without graph breaks; in a rehearsal it traces, and compiles nothing."""
    torch._dynamo.reset()
    run, _, leaves = OPERATIONS[operation]
    backend = "inductor" if setting.cuda else "aot_eager"

    def function(a: dict[str, Any]) -> Any:
        return run(a, "triton")

    inputs = inputs_for(setting, storage, 0, BATCH)
    faster = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    theirs = parity.outputs_and_gradients(faster, arguments(inputs, operation, setting, dtype), leaves)
    plain = _run(operation, arguments(inputs, operation, setting, dtype))
    errors = {name: assert_close(theirs[name], plain[name], dtype, name) for name in plain}
    return {"errors": errors, "backend": backend}


def autocast(setting: Setting, operation: str, storage: str, dtype: torch.dtype) -> Row:
    """float32 arguments under autocast: outputs within the tolerance of its dtype, gradients in float32."""
    x = arguments(inputs_for(setting, storage, 0, 4), operation, setting, torch.float32)
    truth = _run(operation, {name: in_double(value) for name, value in x.items()}, "reference")
    with torch.autocast(setting.device, dtype):
        ours = _run(operation, x)
    errors = {name: relative_error(ours[name], truth[name]) for name in truth}
    for name, error in errors.items():
        # the arguments are rounded first: what the tolerance table allows of one rounding, twice
        assert error <= 2 * TOLERANCE[dtype], f"{name}: error {error:.3g} is above {2 * TOLERANCE[dtype]:.3g}"
        wide = not name.startswith("gradient") or ours[name].dtype == torch.float32
        assert wide, f"{name} is {ours[name].dtype}, its leaf is float32"
    return {"errors": errors, "dtypes": {name: short(value.dtype) for name, value in ours.items()}}


def rows(setting: Setting) -> Rows:
    halves = (torch.bfloat16, torch.float16) if setting.cuda else (torch.float16,)
    compile_dtypes = (torch.float32, torch.bfloat16) if setting.cuda else (torch.float32,)
    for operation in OPERATIONS:
        for storage in STORAGES if operation != "topk_gather" else STORAGES[:1]:
            for what, way, dtypes in (
                ("CUDA graph", replay, setting.dtypes),
                ("torch.compile", compiled, compile_dtypes),
                ("autocast", autocast, halves),
            ):
                if what == "autocast" and operation == "update_strength_":
                    continue  # in place, in the matrix's own dtype
                for dtype in dtypes:

                    def job(way=way, operation=operation, storage=storage, dtype=dtype) -> Row:
                        return way(setting, operation, storage, dtype)

                    yield f"{what} {operation} {storage} {short(dtype)}", job
