"""What every tuning step is made of: variants of one computation, checked, then timed on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from bio_kernels.testing import TOLERANCE, relative_error
from torch import Tensor

from .. import measure
from ..case import Case, Spec
from ..table import duration
from . import races, tables
from .journal import LeftOut, Row
from .setting import Setting
from .timing import graph_seconds

SHIPPED = "as shipped"


@dataclass(frozen=True)
class Variant:
    """name; within: a context in which the computation runs so."""

    name: str
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


def of_case(setting: Setting, question: str, op: str, spec: Spec, variant: Variant) -> Row:
    """A case of the suite by this variant: parity against its float64 truth, then the time in a CUDA graph."""
    spec = races.tiny(spec, op) if setting.rehearsal else spec
    session = replace(setting.session(), short=True)  # no dense baseline: nobody else is raced
    case = races.MODULES[op].case(spec, session)
    return timed_case(question, case, variant)


def timed_case(question: str, case: Case, variant: Variant) -> Row:
    before = tables.compiled()
    with variant.within():
        error = measure.gate(case)
        used = tables.resources(before)
        if variant.name != SHIPPED and used.get("spills", 0) > 0:
            raise LeftOut(f"spills {used['spills']} words at {used.get('registers')} registers")
        direction = case.spec.direction
        taken = graph_seconds(lambda x: measure.prepare(case.ours, direction, x)(), case.sets)
    return answer(question, variant.name, taken, error) | used


def plain(
    question: str, variant: str, run: Callable[[Any], Any], sets: list[Any], found: Tensor, truth: Tensor, dtype: Any
) -> Row:
    """Another computation: found was made by it on the first inputs, truth is what it should be."""
    error = relative_error(found, truth)
    assert error <= TOLERANCE[dtype], f"{variant}: error {error:.3g} is above {TOLERANCE[dtype]:.3g}"
    return answer(question, variant, graph_seconds(run, sets), error)


def answer(question: str, variant: str, taken: float, error: float) -> Row:
    return {"question": question, "variant": variant, "median_s": taken, "error": error}


def conclude(rows: dict[str, Row]) -> Row:
    """The fastest variant of each question beside what is shipped."""
    lines = []
    for question in dict.fromkeys(row["question"] for row in rows.values() if "question" in row):
        answers = {row["variant"]: row["median_s"] for row in rows.values() if row.get("question") == question}
        ranked = sorted(answers, key=answers.__getitem__)
        shipped = answers.get(SHIPPED)
        best = f"{ranked[0]} {duration(answers[ranked[0]])}"
        than = "" if shipped is None else f", shipped {duration(shipped)}: {shipped / answers[ranked[0]]:.2f}x"
        second = f"; then {ranked[1]} {duration(answers[ranked[1]])}" if len(ranked) > 1 else ""
        lines.append(f"{question}: best {best}{than}{second}")
    return {"lines": lines}
