"""Tuning: how gradients are summed (row owner or atomics), hot neurons, heads a program, size of a block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bio_kernels
import torch
from bio_kernels.testing import active_neurons
from torch import Tensor

from .. import test_attention, test_plasticity, test_weighted_rows
from ..case import Case, Contestant, Inputs, Spec, in_double, leaf
from . import experiments, large, races, tables
from .journal import Row
from .questions import SHIPPED, Variant, conclude, plain, timed_case
from .setting import Rows, Setting

KINDS = ("uniform", "zipf", "clustered", "one neuron everywhere")
SETS = 3
TABLE_LEAVES = test_weighted_rows.LEAVES


def neurons(setting: Setting, kind: str, batch: int, n: int, k: int, seed: int) -> Tensor:
    """idx (B, K); "one neuron everywhere": uniform, and neuron 0 in every sample."""
    if kind != "one neuron everywhere":
        return active_neurons(batch, n, k, kind, seed).to(setting.device)
    rest = active_neurons(batch, n - 1, k - 1, "uniform", seed) + 1
    return torch.cat([torch.zeros(batch, 1, dtype=torch.int64), rest], 1).to(setting.device)


def scatter_rows(setting: Setting) -> Rows:
    """Row owner, atomics and torch's own sums, for each distribution of the active neurons."""
    ways = {
        "pairs": {SHIPPED: tables.add_pairs, "atomics": experiments.atomic_add_pairs, "index_put_": _index_put},
        "rows": {SHIPPED: tables.sum_rows, "atomics (index_add_)": experiments.atomic_sum_rows},
    }
    for batch in (256, 32):
        for kind in setting.few(KINDS, 2):
            for what, named in ways.items():
                for name in named:

                    def job(what=what, batch=batch, kind=kind, name=name, function=named[name]) -> Row:
                        make = _pairs if what == "pairs" else _rows
                        return make(setting, batch, kind, name, function)

                    yield f"sum of {what} B={batch} {kind} {name}", job


def _index_put(matrix: Tensor, delta: Tensor, idx: Tensor) -> None:
    matrix.index_put_((idx[:, :, None], idx[:, None, :]), delta, accumulate=True)


def _sizes(setting: Setting, batch: int) -> tuple[int, int, int]:
    return (2, 32, 4) if setting.rehearsal else (batch, 4096, 128)


def _pairs(setting: Setting, batch: int, kind: str, name: str, function: Any) -> Row:
    """delta (B, K, K) into a float32 (N, N); zeroing it is part of it."""
    batch, n, k = _sizes(setting, batch)
    sets: list[Inputs] = []
    for seed in range(SETS):
        delta = torch.randn(batch, k, k, device=setting.device)
        sets.append({"idx": neurons(setting, kind, batch, n, k, seed), "delta": delta})

    def run(x: Inputs) -> Tensor:
        total = torch.zeros(n, n, device=setting.device)
        function(total, x["delta"], x["idx"])
        return total

    idx, truth = sets[0]["idx"], torch.zeros(n, n, dtype=torch.float64, device=setting.device)
    truth.index_put_((idx[:, :, None], idx[:, None, :]), sets[0]["delta"].double(), accumulate=True)
    return plain(f"sum of pairs B={batch} {kind}", name, run, sets, run(sets[0]), truth, torch.float32)


def _rows(setting: Setting, batch: int, kind: str, name: str, function: Any) -> Row:
    """values (B, K, 256) into a float32 (N, 256)."""
    batch, n, k = _sizes(setting, batch)
    sets: list[Inputs] = []
    for seed in range(SETS):
        values = torch.randn(batch, k, 16 if setting.rehearsal else 256, device=setting.device)
        sets.append({"idx": neurons(setting, kind, batch, n, k, seed), "values": values})

    def run(x: Inputs) -> Tensor:
        return function(x["idx"], x["values"], n)

    values = sets[0]["values"].double().flatten(0, 1)
    truth = values.new_zeros(n, values.shape[-1]).index_add_(0, sets[0]["idx"].flatten(), values)
    return plain(f"sum of rows B={batch} {kind}", name, run, sets, run(sets[0]), truth, torch.float32)


# ------------------------------------------------------------------------------------------------- heads


def heads_rows(setting: Setting) -> Rows:
    """A program loops over the heads of a sample; here over fewer, a sample's others being samples of their own."""
    for dtype in (torch.bfloat16, torch.float32):
        for batch in setting.few((256, 32, 1)):
            spec = Spec(batch, heads=8, dtype=dtype, direction="forward")
            for each in (8, 4, 2, 1):
                yield (
                    f"heads a program {str(dtype)[6:]} B={batch} {each}",
                    lambda spec=spec, each=each: _heads(setting, spec, each),
                )


def _heads(setting: Setting, spec: Spec, each: int) -> Row:
    spec = replace(races.tiny(spec, "sparse_attention"), heads=8) if setting.rehearsal else spec
    parts = spec.heads // each

    def split(x: Inputs) -> tuple[Tensor, ...]:
        q, k, v = (x[name].unflatten(1, (parts, each)).flatten(0, 1) for name in "qkv")
        out = bio_kernels.sparse_attention(q, k, v, x["idx of parts"], x["strength"], gate=x["gate of parts"])
        return (out.unflatten(0, (-1, parts)).flatten(1, 2),)

    case = races.MODULES["sparse_attention"].case(spec, replace(setting.session(), short=True))
    case.sets = [
        x | {f"{name} of parts": x[name].repeat_interleave(parts, 0) for name in ("idx", "gate")} for x in case.sets
    ]
    case.ours = Contestant("ours", split, test_attention.LEAVES)
    name = SHIPPED if parts == 1 else f"{each} heads a program"
    question = f"heads a program {str(spec.dtype)[6:]} B={spec.batch} H=8"
    return timed_case(question, case, Variant(name))


# ------------------------------------------------------------------------------------------------- blocks


def blocks_rows(setting: Setting) -> Rows:
    """The same number of stored values, 256 a row of a pool of 65,536, in blocks of 16 to 128."""
    for op in ("sparse_attention", "weighted_rows", "update_strength_"):
        for block_size in (16, 32, 64, 128):
            yield (
                f"blocks of {block_size}, {op}",
                lambda op=op, block_size=block_size: _blocks(setting, op, block_size),
            )


def _blocks(setting: Setting, op: str, block_size: int) -> Row:
    spec = Spec(32, n=65_536, storage="block_sparse", direction="update" if op == "update_strength_" else "both")
    if setting.rehearsal:
        spec = replace(spec, batch=2, n=256, k=8, heads=2, width=16)
    spec = replace(spec, width=spec.n) if op == "weighted_rows" else spec
    matrix = large.random_blocks(setting, spec.n, 256 // block_size, block_size)
    sets = [_block_inputs(setting, op, spec, matrix, seed) for seed in range(SETS)]
    truth = _block_truth(op, sets[0])
    ours = {
        "sparse_attention": Contestant("ours", test_attention.ours, test_attention.LEAVES),
        "weighted_rows": Contestant("ours", test_weighted_rows.ours, TABLE_LEAVES),
        "update_strength_": Contestant("ours", test_plasticity.ours),
    }[op]
    case = Case(op, spec, sets, ours, [], lambda: truth, 0, 0)
    return timed_case(f"size of a block, {op}", case, Variant(f"{block_size}"))


def _block_inputs(setting: Setting, op: str, spec: Spec, matrix: Any, seed: int) -> Inputs:
    """Inputs of the operation, made for a small pool, whose matrix and neurons are then those of the large one."""
    small = replace(spec, n=256, width=256 if op == "weighted_rows" else spec.width)
    x = races.MODULES[op].make(small, setting.device, seed)
    if op == "weighted_rows":
        x["grad"] = (torch.randn(spec.batch, spec.n, device=setting.device),)
    idx = neurons(setting, "uniform", spec.batch, spec.n, spec.k, seed)
    return x | {"idx": idx, "cuda": setting.cuda, "matrix": None, "table": matrix, "strength": matrix}


def _block_truth(op: str, x: Inputs) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The reference in float64."""
    double: Any = {name: in_double(value) for name, value in x.items() if name != "table"}
    matrix, names = double["strength"], test_attention.LEAVES
    double["table"] = matrix
    if op == "update_strength_":
        rule = test_plasticity.RULE
        bio_kernels.update_strength_(matrix, x["idx"], double["pre"], double["post"], **rule, backend="reference")
        return [matrix.blocks.detach()], {}
    if op == "sparse_attention":
        q, k, v = (double[name] for name in "qkv")
        out = bio_kernels.sparse_attention(q, k, v, x["idx"], matrix, gate=double["gate"], backend="reference")
    else:
        out, names = bio_kernels.weighted_rows(matrix, x["idx"], double["weight"], backend="reference"), TABLE_LEAVES
    grads = torch.autograd.grad(out, [leaf(double[name]) for name in names], x["grad"][0].double())
    return [out.detach()], dict(zip(names, grads, strict=True))


__all__ = ["blocks_rows", "conclude", "heads_rows", "scatter_rows"]
