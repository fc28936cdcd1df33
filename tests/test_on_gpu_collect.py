"""The files of a GPU session become one recorded run, from which the README's table can be made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import on_gpu, report
from benchmarks.gpu import collect
from benchmarks.gpu.journal import Journal


def test_a_rehearsal_is_never_collected(tmp_path: Path) -> None:
    Journal(tmp_path, "environment", rehearsal=False).write()
    Journal(tmp_path, "parity_rows", rehearsal=True).write()
    with pytest.raises(SystemExit, match="parity_rows rehearsed without a GPU: those are no results"):
        on_gpu.main(["collect", "--out", str(tmp_path)])


def test_collected_results_are_a_recorded_run(tmp_path: Path) -> None:
    recorded = report.load(collect.RESULTS / "cpu-2026-11-22.json")
    row = report.rows_of(recorded)[0]
    target = {"name": "T1", "what": "attention", "measured": 3.0, "target": 2.5, "at_least": True, "unit": "x"}
    steps: dict[str, dict[str, Any]] = {
        "environment": {
            "machine": {
                "machine_info": {**recorded["machine_info"], "device": "NVIDIA H200"},
                "commit_info": {"id": "0123456789abcdef"},
                "datetime": "2026-12-01T10:00:00+00:00",
            }
        },
        "suite": {"a": row, "b": {"status": "error", "message": "broke"}},
        "targets": {"T1": {**row, "targets": [{**target, "reached": True}]}},
        "parity_rows": {"x": {"worst": 1e-6}},
    }
    for name, rows in steps.items():
        made = Journal(tmp_path / "out", name, rehearsal=False)
        made.rows = {key: {"status": "ok", **value} for key, value in rows.items()}
        made.write()
    path = collect.write(tmp_path / "out", tmp_path)
    assert path.name == "nvidia-h200-2026-12-01.json"
    run = report.load(path)
    assert len(report.rows_of(run)) == 1, "a target's row does not stand in the table of the suite again"
    text = "\n".join(report.markdown(run))
    assert "Measured on NVIDIA H200" in text
    assert "commit 0123456789" in text
    assert "T1 reached: 3x (target >= 2.5x) attention" in text
    assert run["steps"]["parity_rows"]["rows"]["x"]["worst"] == 1e-6


def test_nothing_is_collected_without_the_machine(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no results there"):
        collect.read(tmp_path)
    Journal(tmp_path, "parity_rows", rehearsal=False).write()
    with pytest.raises(SystemExit, match="the step environment is missing"):
        collect.write(tmp_path, tmp_path)
