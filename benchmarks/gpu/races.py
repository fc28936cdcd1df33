"""The benchmark suite row by row: the cases of the test files, measured by the same machinery, without pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from .. import inputs, measure, roofline, test_attention, test_plasticity, test_topk_gather, test_weighted_rows
from ..case import Case, Spec
from ..roofline import Roofline
from ..table import summary_lines, times
from .journal import Row
from .setting import Rows, Setting

MODULES: dict[str, ModuleType] = {
    "sparse_attention": test_attention,
    "topk_gather": test_topk_gather,
    "weighted_rows": test_weighted_rows,
    "update_strength_": test_plasticity,
}
TINY = {"batch": 2, "n": 256, "k": 8, "heads": 2, "width": 16}
WORST = 15  # rows named at the end
UNMEASURED = Roofline(1.0, {"float32": 1.0, "bfloat16": 1.0})


class Stopwatch:
    """What measure() needs of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.group: str | None = None
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Callable[..., Any], setup: Callable[[], Any], rounds: int) -> None:
        for _ in range(rounds):
            args, kwargs = setup()
            target(*args, **kwargs)


def ceiling(setting: Setting) -> Roofline:
    return roofline.measured(setting.device) if setting.cuda else UNMEASURED


def race(setting: Setting, case: Case) -> Row:
    """Parity of ours and every peer, then all in turn, eager and as CUDA graphs; WrongResult if ours is wrong."""
    if not setting.rehearsal:
        row = measure.measure(Stopwatch(), case, ceiling(setting))
    else:
        with mock.patch.object(measure, "BUDGET_S", 0.01), mock.patch.object(measure, "MIN_ROUNDS", 1):
            row = measure.measure(Stopwatch(), case, UNMEASURED)
    row |= graph_ratios(row)
    return row | {"name": f"{case.op} {case.spec}"}


def graph_ratios(row: Row) -> Row:
    """The ratios of the CUDA graphs, where ours could be captured; the share of the roofline that ours reaches."""
    graph = row.get("graph_s", {})
    if "ours" not in graph:
        return {}
    ours, peers = graph["ours"], {name: t for name, t in graph.items() if name != "ours"}
    best = min(peers, key=peers.__getitem__) if peers else None
    return {
        "graph_ratios": {name: t / ours for name, t in peers.items()},
        "graph_best_peer": best,
        "graph_ratio": peers[best] / ours if best else None,
        "graph_roofline": row["roofline"] * row["ours_s"] / ours,
    }


def forget() -> None:
    """Drops the inputs and truths that the cases keep for the next row of the same inputs, and their matrices."""
    for module in MODULES.values():
        module.sets.cache_clear()
        module.truth.cache_clear()
    inputs.forget()


def tiny(spec: Spec, op: str) -> Spec:
    """The same kind of row at the smallest sizes."""
    width = TINY["n"] if op == "weighted_rows" and spec.width == spec.n else TINY["width"]
    return replace(spec, **{**TINY, "width": width}, dtype=torch.float32, compiled=False)


def specs(setting: Setting) -> Iterator[tuple[str, Spec]]:
    """The rows that pytest would run on a GPU: the default ones of every operation first, then those of --full."""
    listed: list[tuple[str, Spec]] = []
    for full in (False, True):
        for op, module in MODULES.items():
            for spec in module.rows(full, True):
                seen = {replace(other, compiled=False) for name, other in listed if name == op}
                if replace(spec, compiled=False) not in seen:
                    listed.append((op, spec))
    if setting.rehearsal:
        small = {(op, tiny(spec, op)) for op, spec in listed if spec.distribution == "uniform"}
        listed = sorted(small, key=str)
        listed = [next(pair for pair in listed if pair[0] == op) for op in MODULES]
    yield from listed


def rows(setting: Setting) -> Rows:
    session, last = setting.session(), None
    for op, spec in specs(setting):

        def job(op=op, spec=spec) -> Row:
            nonlocal last
            if last != (op, spec.inputs):
                forget()
            last = (op, spec.inputs)
            return race(setting, MODULES[op].case(spec, session))

        yield f"{op} {spec}", job


def conclude(rows: dict[str, Row]) -> Row:
    """Means, worst cases, and the rows in which ours does worst, eager and as CUDA graphs."""
    raced = [row for row in rows.values() if row.get("ratio") is not None]
    replayed = [
        row | {"ratio": row["graph_ratio"], "best_peer": row["graph_best_peer"]}
        for row in raced
        if row.get("graph_ratio") is not None
    ]
    lines = []
    for how, found in (("eager", raced), ("CUDA graph", replayed)):
        lines += [f"{how}: {line}" for line in summary_lines(found)]
        worst = sorted(found, key=lambda row: row["ratio"])[:WORST]
        lines += [f"{how}: {times(row['ratio'])} {row['best_peer']}: {row['name']}" for row in worst]
    return {"lines": lines}
