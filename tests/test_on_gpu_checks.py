"""The steps that run programs of others: the checker of memory and races, the test suite; faked where they are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bio_kernels.testing import make_inputs

pytest.importorskip("triton")

from benchmarks.gpu import condition, sanitizer, setting, smallest, suite_of_tests
from benchmarks.gpu.determinism import OPERATIONS
from benchmarks.gpu.journal import Journal, LeftOut, OutOfTime
from benchmarks.gpu.setting import Setting, child

# ------------------------------------------------------------------------------------------------- child processes


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_child_finds_the_checkout(tmp_path: Path) -> None:
    done = child(
        Setting(False, tmp_path), python("import benchmarks, bio_kernels, os; print(os.environ['MORE'])"), 60, MORE="x"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "x"), done.stderr


def test_a_child_that_takes_too_long(tmp_path: Path) -> None:
    """It ends with what it has started, which would hold its output open otherwise."""
    started = tmp_path / "started"
    text = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(started)!r}, 'w').write(str(p.pid))"
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        child(Setting(False, tmp_path), python(text + "; p.wait()"), 2)
    assert time.monotonic() - begin < 30
    pid = int(started.read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or ") Z" in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    pytest.fail("what the child had started goes on")


def test_the_end_of_the_call_is_no_failure_of_the_child(tmp_path: Path) -> None:
    for left in (-5, 1):
        with pytest.raises(OutOfTime):
            child(Setting(False, tmp_path, end=time.monotonic() + left), python("import time; time.sleep(60)"), 30)


# ------------------------------------------------------------------------------------------------- the checker

REPORT = """
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _gather_kernel+0x1a0
========= ERROR SUMMARY: 2 errors
ran 4 shapes
"""


@pytest.fixture
def checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a compute-sanitizer on the path that keeps its arguments, prints the text and ends with the code."""

    def make(text: str, code: int = 0) -> Path:
        path = tmp_path / "bin" / "compute-sanitizer"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat <<"END"\n{text}\nEND\nexit {code}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
        return tmp_path / "arguments"

    return make


def watch(tmp_path: Path, tool: str = "memcheck") -> dict:
    return sanitizer.watch(Setting(False, tmp_path), tool, "topk_gather", "tiled")


def test_a_clean_report(checker, tmp_path: Path) -> None:
    arguments = checker("========= ERROR SUMMARY: 0 errors\nran 4 shapes")
    assert watch(tmp_path) == {"summary": ["ERROR SUMMARY: 0 errors"]}
    said = arguments.read_text()
    assert "--tool memcheck --report-api-errors no --launch-timeout 0" in said
    assert said.rstrip().endswith("-m benchmarks.gpu.smallest topk_gather cuda tiled")


def test_findings_are_counted_and_named(checker, tmp_path: Path) -> None:
    checker(REPORT, sanitizer.FOUND)
    with pytest.raises(
        AssertionError, match="memcheck: 2 findings in _gather_kernel: Invalid __global__ read of size 4"
    ):
        watch(tmp_path)
    checker("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\nran 4 shapes")
    with pytest.raises(AssertionError, match="racecheck: 1 findings in no kernel of ours"):
        watch(tmp_path, "racecheck")


def test_a_checker_that_saw_nothing_is_an_error(checker, tmp_path: Path) -> None:
    checker("========= No attachable process found\nran 4 shapes")
    with pytest.raises(RuntimeError, match=r"(?s)the checker did not attach: .*No attachable process"):
        watch(tmp_path)
    checker("========= ERROR SUMMARY: 0 errors\nran 4 shapes")
    with pytest.raises(RuntimeError, match="the checker did not attach"):
        watch(tmp_path, "racecheck")


def test_a_target_that_crashed_is_an_error(checker, tmp_path: Path) -> None:
    checker("========= ERROR SUMMARY: 0 errors\nTraceback: broken", 1)
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1: .*broken"):
        watch(tmp_path)
    checker("========= ERROR SUMMARY: 0 errors")
    with pytest.raises(RuntimeError, match="ended with 0"):
        watch(tmp_path)


def test_a_gpu_that_the_checker_does_not_know(checker, tmp_path: Path) -> None:
    checker("========= Error: Device not supported. Please refer to the documentation", 1)
    with pytest.raises(LeftOut, match="does not support it"):
        watch(tmp_path)


def test_every_operation_is_watched_in_every_size(tmp_path: Path) -> None:
    keys = [key for key, _ in sanitizer.rows(Setting(False, tmp_path))]
    assert len(keys) == len(set(keys)) == 2 * 2 * len(OPERATIONS)
    assert all(set(shapes) == set(OPERATIONS) for shapes in smallest.SHAPES.values())


def test_tiled_shapes_share_neurons_and_exceed_the_tiles() -> None:
    from benchmarks.gpu import tables

    shapes = {operation: found[0] for operation, found in smallest.SHAPES["tiled"].items()}
    _, n, k = shapes["topk_gather"]
    assert n > tables.FILES["select"].WHOLE
    assert 4 * k * smallest.WIDTHS["tiled"]["width"] > tables.FILES["gather"].FUSED_BYTES
    q = torch.empty(1, 2, shapes["sparse_attention"][2], smallest.WIDTHS["tiled"]["head_width"])
    for name, entries in (("attention", "FORWARD"), ("backward", "ROWS"), ("backward", "COLUMNS")):
        for dtype in (torch.float32, torch.float16):
            shape = tables.FILES["attention"].launch_shape(getattr(tables.FILES[name], entries), q.to(dtype))[1]
            assert not shape["ONE_TILE"]
    batch, n, k = shapes["weighted_rows"]
    counts = make_inputs(batch, n, k, kind="zipf").idx.flatten().bincount()
    assert int(counts.max()) > tables.FILES["segment"].RUN_BLOCK
    assert shapes["update_strength_"][2] > tables.FILES["pairs"].MAX_WALK


# ------------------------------------------------------------------------------------------------- the test suite

TESTS = """
import os, pytest

@pytest.mark.gpu
def test_good():
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

@pytest.mark.gpu
def test_bad():
    assert False, "a wrong kernel"

def test_of_a_cpu():
    assert False
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkout with one file of tests of its own, named "made_up"."""

    def make(text: str) -> Setting:
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / "test_made_up.py").write_text(text)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
        monkeypatch.setattr(setting, "ROOT", tmp_path)
        return Setting(False, tmp_path / "out")

    return make


def test_the_names_of_failed_tests(suite, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"1 failed, 1 passed.*; test_bad: AssertionError: a wrong kernel"):
        suite_of_tests.of_file(suite(TESTS), "made_up")
    assert not (tmp_path / "out").exists(), "reports are not results"
    found = suite_of_tests.of_file(suite(TESTS.replace("assert False, ", "assert True, ")), "made_up")
    assert "1 deselected" in found["summary"]


def test_a_file_without_tests_of_the_gpu(suite) -> None:
    with pytest.raises(LeftOut, match="no test of the GPU"):
        suite_of_tests.of_file(suite("def test(): pass"), "made_up")


def test_a_suite_that_broke(suite) -> None:
    with pytest.raises(AssertionError, match="test_made_up: "):
        suite_of_tests.of_file(suite("import not_there"), "made_up")
    with pytest.raises(RuntimeError, match="pytest ended with 7"):
        suite_of_tests.of_file(suite("import os; os._exit(7)"), "made_up")


def test_many_processes_where_there_are_such_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(*packages: str) -> str:
        monkeypatch.setattr(suite_of_tests, "installed", lambda name: name in packages)
        return " ".join(suite_of_tests.command(Setting(False, tmp_path), "attention", tmp_path / "report.xml"))

    assert line("xdist", "pytest_timeout").endswith("-n 12 --dist load --timeout 90 --timeout-method thread")
    assert line("pytest_timeout").endswith("--timeout 90")
    assert line().endswith(f"-m gpu --junitxml {tmp_path}/report.xml")


def test_the_commit_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCHMARKS_COMMIT", "0123abc")
    if (setting.ROOT / ".git").exists():
        assert setting.commit()["id"] != "0123abc", "git knows better"
    monkeypatch.setattr(setting, "ROOT", tmp_path)
    assert setting.commit() == {"id": "0123abc"}
    monkeypatch.delenv("BENCHMARKS_COMMIT")
    assert setting.commit() == {}


# ------------------------------------------------------------------------------------------------- the GPU's condition

SMI = """#!/bin/sh
case "$1" in *{known}*) echo "570.1, 1980 MHz, 2619 MHz, 75.20 W, 30, 0x0000000000000001"; echo "570.1, second GPU";;
*) echo "Field is not a valid field to query."; exit 2;; esac
"""


@pytest.mark.parametrize("known", condition.REASONS)
def test_a_step_says_how_fast_the_gpu_ran(known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the old name of a field and by the new one."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI.format(known=known))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for number in (1, 2):
        journal = Journal(tmp_path / "out", "step", rehearsal=False)
        with journal.whole():
            journal.run(str(number), dict)
    held = json.loads((tmp_path / "out" / "step.json").read_text())["gpu"]
    assert [reading["when"] for reading in held] == ["start", "end"] * 2
    assert held[0]["clocks.sm"] == "1980 MHz"
    assert held[0]["clocks_throttle_reasons.active"] == "0x0000000000000001"


def test_a_machine_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert condition.read() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    assert condition.read() is None
