"""The same inputs, run after run, must give the same bits (T12): every operation forward and backward, hot neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bio_kernels.testing import Inputs, generator, make_inputs

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

GATED = OPERATIONS["sparse_attention"][1]
# what attention does differently -> (changed sizes, arguments, storages)
ATTENTION: dict[str, tuple[dict[str, int], str, tuple[str, ...]]] = {
    "without gate": ({}, GATED.removesuffix(" gate"), ("dense",)),
    "with count": ({}, f"{GATED} count", ("dense",)),
    "K=256": ({"k": 256}, GATED, STORAGES),  # in 16 bit the most senders of one tile
    "K=300": ({"k": 300}, GATED, STORAGES),  # several tiles
}
CHUNKED = ((32, 70_000, 128, 64), (32, 70_000, 300, 128))  # B, N, K, D of selections from rows in several chunks


def inputs_for(setting: Setting, storage: str, seed: int = 0, batch: int = 256, **changed: int) -> Inputs:
    """A batch in which some neurons are active in nearly every sample, so that many sums meet."""
    size = {"batch": 2, "n": 32, "k": 5, "heads": 2, "head_width": 4, "width": 3, "block_size": 16}
    if setting.cuda:
        size = {
            "batch": batch,
            "n": 4096,
            "k": 128,
            "heads": 4,
            "head_width": 32,
            "width": 64,
            "block_size": 32,
        } | changed
    return make_inputs(**size, storage=storage, kind="zipf", seed=seed)


def arguments(x: Inputs, operation: str, setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    moved = x.to(dtype, setting.device, grad=True)
    return {name: getattr(moved, name) for name in OPERATIONS[operation][1].split()} | {"bounded": True}


def repeat(setting: Setting, operation: str, storage: str, dtype: torch.dtype, runs: int) -> Row:
    return same_again(operation, arguments(inputs_for(setting, storage), operation, setting, dtype), runs)


def attention(setting: Setting, how: str, storage: str, dtype: torch.dtype, runs: int) -> Row:
    changed, names, _ = ATTENTION[how]
    x = inputs_for(setting, storage, batch=32, **changed).to(dtype, setting.device, grad=True)
    batch, k = x.idx.shape
    count = (k - torch.arange(batch) % k).to(setting.device)
    return same_again("sparse_attention", {n: count if n == "count" else getattr(x, n) for n in names.split()}, runs)


def chunked(setting: Setting, shape: tuple[int, int, int, int], dtype: torch.dtype, runs: int) -> Row:
    return same_again("topk_gather", selection(*shape, {"device": setting.device, "dtype": dtype}), runs)


def selection(batch: int, n: int, k: int, width: int, how: dict[str, Any]) -> dict[str, Any]:
    """What topk_gather is run with, without the N x N matrix of the others; of idx only the shape is looked at."""
    g = generator(n + k)
    score, table = (torch.randn(*s, generator=g).to(**how).requires_grad_() for s in ((batch, n), (n, width)))
    return {"score": score, "table": table, "idx": torch.empty(batch, k)}


def same_again(operation: str, own: dict[str, Any], runs: int) -> Row:
    """AssertionError names what differs between the first run and a later one."""
    run, _, leaves = OPERATIONS[operation]
    leaves = tuple(name for name in leaves if name in own)

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
    for dtype in setting.dtypes:
        for shape in CHUNKED if setting.cuda else ((2, 9000, 5, 3),):
            key = "topk_gather B{} N{} K{} D{}".format(*shape)
            yield f"{key} {short(dtype)} {runs} runs", lambda a=(shape, dtype): chunked(setting, *a, runs)
        for how, (_, _, storages) in ATTENTION.items():
            if how == "K=256" and dtype == torch.float32 and setting.cuda:
                continue
            for storage in storages:
                key = f"sparse_attention {how} {storage} {short(dtype)} {runs} runs"
                yield key, lambda a=(how, storage, dtype): attention(setting, *a, runs)
