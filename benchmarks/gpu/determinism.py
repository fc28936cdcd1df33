"""The same inputs, run after run, must give the same bits (T12): every operation forward and backward, hot neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bio_kernels.testing import Inputs, make_inputs

from ..case import clone_inputs
from . import parity
from .journal import Row
from .setting import Rows, Setting, same_bits, short

RUNS = 100
STORAGES = ("dense", "block_sparse")
# operation -> (what runs it, names of its arguments, leaves)
OPERATIONS: dict[str, tuple[Callable[..., Any], str, tuple[str, ...]]] = {
    "topk_gather": (parity.topk_gather, "score table idx", ("score", "table")),
    "sparse_attention": (parity.sparse_attention, "q k v idx strength gate", ("q", "k", "v", "strength", "gate")),
    "weighted_rows": (parity.weighted_rows, "strength idx pre", ("strength", "pre")),
    "update_strength_": (parity.update_strength, "strength idx pre post", ()),
}


def inputs_for(setting: Setting, storage: str, seed: int = 0, batch: int = 256) -> Inputs:
    """A batch in which some neurons are active in nearly every sample, so that many sums meet."""
    size = {"batch": 2, "n": 32, "k": 5, "heads": 2, "head_width": 4, "width": 3, "block_size": 16}
    if setting.cuda:
        size = {"batch": batch, "n": 4096, "k": 128, "heads": 4, "head_width": 32, "width": 64, "block_size": 32}
    return make_inputs(**size, storage=storage, kind="zipf", seed=seed)


def arguments(x: Inputs, operation: str, setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    moved = x.to(dtype, setting.device, grad=True)
    return {name: getattr(moved, name) for name in OPERATIONS[operation][1].split()} | {"bounded": True}


def repeat(setting: Setting, operation: str, storage: str, dtype: torch.dtype, runs: int) -> Row:
    run, _, leaves = OPERATIONS[operation]
    own = arguments(inputs_for(setting, storage), operation, setting, dtype)

    def once() -> parity.Results:
        fresh = clone_inputs(own) if operation == "update_strength_" else own
        return parity.outputs_and_gradients(lambda a: run(a, "triton"), fresh, leaves)

    first = once()
    for number in range(1, runs):
        again = once()
        differ = [name for name in first if not same_bits(first[name], again[name])]
        assert not differ, f"run {number} of {runs} differs from the first in {', '.join(differ)}"
    return {"runs": runs, "compared": sorted(first)}


def rows(setting: Setting) -> Rows:
    runs = 3 if setting.rehearsal else RUNS
    for operation in OPERATIONS:
        for storage in STORAGES:
            if operation == "topk_gather" and storage != "dense":
                continue
            for dtype in setting.dtypes:

                def job(operation=operation, storage=storage, dtype=dtype) -> Row:
                    return repeat(setting, operation, storage, dtype, runs)

                yield f"{operation} {storage} {short(dtype)} {runs} runs", job
