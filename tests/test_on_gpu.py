"""The script of a GPU session, rehearsed without one: what it records, how it goes on after a cut, when it says no."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import bio_kernels as bk
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import on_gpu
from benchmarks.gpu import closing, determinism, journal, parity
from benchmarks.gpu.journal import Journal, LeftOut
from benchmarks.gpu.setting import Setting

pytestmark = [
    pytest.mark.default_memory,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU"),
]
Jobs = dict[str, Callable[[], dict[str, Any]]]


@pytest.fixture(autouse=True)
def rehearsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rehearsal sets is taken back; of each list of shapes it takes the first alone."""
    for name, value in (("TRITON_INTERPRET", "1"), ("BIO_KERNELS_BACKEND", "triton")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Setting, "few", lambda self, items, number=1: list(items)[:1])


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a step named "made_up" with these jobs beside the others."""

    def make(jobs: Jobs, checks: bool = False) -> None:
        module = ModuleType("benchmarks.gpu.made_up")

        def rows(setting: Setting) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
            yield from jobs.items()

        module.rows = rows  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        made_up = on_gpu.Step("made_up", 1, 60, "made_up", "rows", checks, "made up")
        monkeypatch.setitem(on_gpu.NAMED, "made_up", made_up)

    return make


def rehearse(out: Path, *arguments: str) -> int:
    return on_gpu.main([*arguments, "--out", str(out), "--rehearse"], supervised=False)


def held(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / f"{name}.json").read_text())


def statuses(out: Path, name: str = "made_up") -> dict[str, str]:
    return {key: row["status"] for key, row in held(out, name)["rows"].items()}


# ------------------------------------------------------------------------------------------------- the command line


def test_list_names_every_step(capsys: pytest.CaptureFixture) -> None:
    assert on_gpu.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{step.name} " in printed and step.what in printed for step in on_gpu.STEPS)
    assert "stands for parity_topk, parity_attention, parity_rows, parity_update" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["parity", "tuning_x", "--out", "d"], "unknown step tuning_x; there are: environment, parity"),
        (["parity"], "--out DIR is needed"),
        ([], "name a step, all, or collect"),
        (["language", "--out", "d", "--data", "no/text.txt"], "--data must be a file, got no/text.txt"),
    ],
)
def test_wrong_commands(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main(arguments)
    assert said in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------------- rehearsals


@pytest.mark.parametrize("name", ["environment", "parity_rows", "addressing", "tuning_select"])
def test_rehearsal(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert rehearse(tmp_path, name) == 0
    found = held(tmp_path, name)
    assert found["complete"]
    assert found["rehearsal"]
    assert len(found["rows"]) >= 2
    assert all(row["status"] == "ok" for row in found["rows"].values()), found["rows"]
    assert all(row["rehearsal"] == "no figure here is a result" for row in found["rows"].values())
    assert "a rehearsal without a GPU: nothing was measured" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", [s.name for s in on_gpu.STEPS if s.name != "tests"])
def test_rehearsal_of_every_step(name: str, tmp_path: Path) -> None:
    assert rehearse(tmp_path, name) == 0
    assert set(statuses(tmp_path, name).values()) <= {"ok", "left out"}
    assert held(tmp_path, name)["complete"]


def test_a_wrong_kernel_is_recorded_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = bk.weighted_rows

    def wrong(table: Any, idx: Tensor, weight: Tensor, *, backend: str, **how: Any) -> Tensor:
        out = right(table, idx, weight, backend=backend, **how)
        return out * 1.001 if backend == "triton" else out

    monkeypatch.setattr(bk, "weighted_rows", wrong)
    monkeypatch.setattr(parity, "TOPK", [])
    assert rehearse(tmp_path, "parity_topk", "parity_rows") == 1
    assert statuses(tmp_path, "parity_topk") == {}
    found = held(tmp_path, "parity_rows")["rows"].values()
    assert found
    assert all("output 0: error 0.001" in row["message"] for row in found if row["status"] == "failed")
    assert {row["status"] for row in found} == {"failed"}
    assert "FAILED  parity_rows: float32 dense B2" in capsys.readouterr().out


def test_bits_that_differ_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every row of the step determinism whose operation it is; in every third run."""
    right, calls = bk.sparse_attention, []

    def wrong(*args: Any, **how: Any) -> Tensor:
        calls.append(how)
        return right(*args, **how) * (1 + 1e-7 * (len(calls) % 3 == 0))

    monkeypatch.setattr(bk, "sparse_attention", wrong)
    attention = {"sparse_attention": determinism.OPERATIONS["sparse_attention"]}
    ways = {name: determinism.ATTENTION[name] for name in ("without gate", "with count")}
    topk = {"topk_gather": determinism.OPERATIONS["topk_gather"]}
    monkeypatch.setattr(determinism, "OPERATIONS", topk | attention)
    monkeypatch.setattr(determinism, "ATTENTION", ways)
    assert rehearse(tmp_path, "determinism") == 1
    found = held(tmp_path, "determinism")["rows"]
    assert {key for key, row in found.items() if row["status"] == "ok"} == {key for key in found if "topk" in key}
    failed = [row["message"] for row in found.values() if row["status"] == "failed"]
    assert len(failed) == 2 + 2
    assert all("run 2 of 3 differs from the first in output 0, gradient of q" in message for message in failed)
    assert sum("count" in how for how in calls) == sum("gate" not in how for how in calls) == 3


def test_steps_of_a_name() -> None:
    def names(*given: str) -> list[str]:
        return [step.name for step in on_gpu.parsed([*given, "--out", "d"])[1]]

    parts = ["parity_topk", "parity_attention", "parity_rows", "parity_update"]
    assert names("parity") == parts
    assert names("parity_rows", "tests", "parity") == [
        "parity_rows",
        "tests",
        *(p for p in parts if p != "parity_rows"),
    ]
    assert names("all") == [step.name for step in on_gpu.STEPS]


# ------------------------------------------------------------------------------------------------- the journal


def test_a_cut_run_goes_on(tmp_path: Path, step: Callable[..., None]) -> None:
    ran: list[str] = []
    patience = [KeyboardInterrupt()]

    def second() -> dict[str, Any]:
        ran.append("second")
        if patience:
            raise patience.pop()
        return {}

    def job(name: str) -> dict[str, Any]:
        ran.append(name)
        return {"name": name}

    step({"first": lambda: job("first"), "second": second, "third": lambda: job("third")})
    with pytest.raises(KeyboardInterrupt):
        rehearse(tmp_path, "made_up")
    assert statuses(tmp_path) == {"first": "ok", "second": "running"}
    assert not held(tmp_path, "made_up")["complete"]
    assert rehearse(tmp_path, "made_up") == 0
    assert ran == ["first", "second", "second", "third"]
    assert statuses(tmp_path) == {"first": "ok", "second": "ok", "third": "ok"}
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_cut_every_time_is_left_behind(tmp_path: Path, step: Callable[..., None]) -> None:
    def hang() -> dict[str, Any]:
        raise KeyboardInterrupt

    step({"hangs": hang, "next": dict})
    for _ in range(journal.ATTEMPTS):
        with pytest.raises(KeyboardInterrupt):
            rehearse(tmp_path, "made_up")
    assert rehearse(tmp_path, "made_up") == 0
    assert statuses(tmp_path) == {"hangs": "cut", "next": "ok"}


def test_no_row_is_begun_when_time_is_out(tmp_path: Path, step: Callable[..., None], capsys) -> None:
    step({"first": dict})
    assert rehearse(tmp_path, "made_up", "--minutes", "-1") == 0
    assert statuses(tmp_path) == {}
    assert "made_up: NOT COMPLETE, nothing done" in capsys.readouterr().out


@pytest.mark.parametrize("checks", [True, False])
def test_errors_end_no_step(tmp_path: Path, step: Callable[..., None], checks: bool) -> None:
    """Only of a step that checks results is an error a wrong result."""

    def breaks(error: Exception) -> Callable[[], dict[str, Any]]:
        def job() -> dict[str, Any]:
            raise error

        return job

    full = torch.OutOfMemoryError("tried to allocate 2 TiB")
    step({"full": breaks(full), "absent": breaks(LeftOut("not here")), "fine": dict}, checks)
    assert rehearse(tmp_path, "made_up") == int(checks)
    assert statuses(tmp_path) == {"full": "error", "absent": "left out", "fine": "ok"}
    assert held(tmp_path, "made_up")["rows"]["full"]["message"] == "OutOfMemoryError: tried to allocate 2 TiB"


def test_again_repeats_what_was_not_ok(tmp_path: Path, step: Callable[..., None]) -> None:
    ran: list[str] = []
    verdicts = iter([AssertionError("wrong"), None])

    def doubtful() -> dict[str, Any]:
        ran.append("doubtful")
        verdict = next(verdicts)
        if verdict is not None:
            raise verdict
        return {}

    step({"fine": lambda: ran.append("fine") or {}, "doubtful": doubtful})
    assert rehearse(tmp_path, "made_up") == 1
    assert rehearse(tmp_path, "made_up") == 1  # what is known is told again
    assert rehearse(tmp_path, "made_up", "--again") == 0
    assert ran == ["fine", "doubtful", "doubtful"]


@pytest.mark.parametrize("checks", [True, False])
def test_an_error_outside_of_the_rows(
    tmp_path: Path, step: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys, checks: bool
) -> None:
    """It is kept, other steps run, and the next call tries again."""
    step({"first": dict}, checks)
    module = sys.modules["benchmarks.gpu.made_up"]
    right = module.rows

    def broken(setting: Setting) -> Iterator[Any]:
        yield from right(setting)
        raise KeyError("shape")

    monkeypatch.setattr(module, "rows", broken)
    monkeypatch.setitem(on_gpu.NAMED, "absent", on_gpu.NAMED["made_up"]._replace(name="absent", module="not_there"))
    assert rehearse(tmp_path, "absent", "made_up") == int(checks)
    assert statuses(tmp_path, "absent") == {"step": "error"}
    assert "No module named 'benchmarks.gpu.not_there'" in held(tmp_path, "absent")["rows"]["step"]["message"]
    assert statuses(tmp_path) == {"first": "ok", "step": "error"}
    assert not held(tmp_path, "made_up")["complete"]
    assert "error  made_up: step: KeyError: 'shape'" in capsys.readouterr().out
    monkeypatch.setattr(module, "rows", right)
    assert rehearse(tmp_path, "made_up") == 0
    assert statuses(tmp_path) == {"first": "ok"}
    assert held(tmp_path, "made_up")["complete"]


def test_a_rehearsal_and_results_do_not_mix(tmp_path: Path) -> None:
    Journal(tmp_path, "parity_rows", rehearsal=True).write()
    with pytest.raises(SystemExit, match="holds a rehearsal: take another --out"):
        Journal(tmp_path, "parity_rows", rehearsal=False)


def test_the_end_is_short(tmp_path: Path) -> None:
    """Failures come before everything that rows have to tell."""
    full = Journal(tmp_path, "targets", rehearsal=False)
    full.rows = {str(i): {"status": "ok", "line": "x" * 500} for i in range(200)}
    full.rows["bad"] = {"status": "failed", "message": "output 0: error 1"}
    lines = closing.lines([full])
    assert len(lines) == closing.LINES
    assert lines[1] == "FAILED  targets: bad: output 0: error 1"
    assert max(map(len, lines)) <= closing.WIDTH
