"""A GPU session outlives the processes that work for it: crashes, a lost GPU, rows without an end, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import on_gpu
from benchmarks.gpu import supervision

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")

# ------------------------------------------------------------------------------------------------- the one that waits


def supervise(tmp_path: Path, *workers: str, end: float = 60.0) -> int:
    """Workers that run these lines of Python; `begun` is the file of a step."""
    begun = tmp_path / "step.json"
    opening = f"import os, pathlib, signal, sys, time; begun = pathlib.Path({str(begun)!r})\n"
    started = tmp_path / "started"

    def command(number: int) -> list[str]:
        started.write_text(str(number + 1))
        return [sys.executable, "-c", opening + workers[min(number, len(workers) - 1)]]

    return supervision.supervise(command, time.monotonic() + end, [begun])


def started(tmp_path: Path) -> int:
    return int((tmp_path / "started").read_text())


WRITES = "begun.write_text(str(time.time_ns()));"
CRASHES = WRITES + "os.kill(os.getpid(), signal.SIGSEGV)"


def test_a_worker_follows_one_that_ended_too_early(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    workers = (CRASHES, WRITES + f"sys.exit({supervision.ANEW})", WRITES + "raise KeyError", WRITES)
    assert supervise(tmp_path, *workers) == 0
    assert started(tmp_path) == 4
    said = capfd.readouterr().out
    assert "ended with SIGSEGV" in said
    assert "ended with exit code 1" in said
    assert "another one goes on (3 of at most 20)" in said


def test_what_ends_before_it_begins_is_not_tried_again(tmp_path: Path) -> None:
    assert supervise(tmp_path, "raise ImportError") == 1
    assert started(tmp_path) == 1


def test_restarts_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "MOST_RESTARTS", 2)
    assert supervise(tmp_path, CRASHES) == 1
    assert started(tmp_path) == 3


def test_no_worker_is_begun_when_time_is_out(tmp_path: Path) -> None:
    assert supervise(tmp_path, CRASHES, end=0.0) == 0
    assert started(tmp_path) == 1


def test_a_machine_that_is_refused(tmp_path: Path) -> None:
    refuses = f"sys.exit({supervision.REFUSED})"
    assert supervise(tmp_path, refuses) == supervision.REFUSED
    assert supervise(tmp_path, CRASHES, refuses) == 1, "that the GPU has gone meanwhile is an error"


TELLS = "os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)"


def test_signals_are_passed_on(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    obeys = "signal.signal(signal.SIGTERM, lambda *_: (begun.write_text('told'), sys.exit(143)));" + TELLS
    assert supervise(tmp_path, obeys) == 0
    assert (tmp_path / "step.json").read_text() == "told"
    assert started(tmp_path) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_that_does_not_obey_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "GRACE_S", 0.2)
    begin = time.monotonic()
    assert supervise(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN);" + TELLS) == 0
    assert time.monotonic() - begin < 20


def test_what_a_lost_worker_had_started_ends_with_it(tmp_path: Path) -> None:
    child = tmp_path / "child"
    begins = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(p.pid));"
    assert supervise(tmp_path, begins + CRASHES, WRITES) == 0
    assert gone(int(child.read_text()))


def gone(pid: int) -> bool:
    """Whether it ends soon; a zombie has ended."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------------------------------------- the whole of it

MADE_UP = '''
"""benchmarks.on_gpu with a step more, whose rows go wrong in every way; both its processes run this file."""
import ctypes, os, pathlib, signal, subprocess, sys, time
from types import ModuleType
from benchmarks import on_gpu
from benchmarks.gpu import supervision

def crash():
    os.kill(os.getpid(), signal.SIGSEGV)

def lose():
    from benchmarks.gpu import journal
    def free(): raise journal.DeviceLost("illegal memory access")
    journal.free = free
    return {}

def hang():
    time.sleep(60)

def launch_without_an_end():
    from benchmarks.gpu import journal
    journal.free = hang  # where a row that waits for nothing finds out
    return {}

def keep_the_lock():
    ctypes.PyDLL(None).sleep(60)

def wait():
    child = subprocess.Popen(["sleep", "60"])
    pathlib.Path("waiting").write_text(f"{os.getpid()} {child.pid}")
    child.wait()

ROWS = {"fine": dict, "crash": crash, "lose": lose, "hang": hang, "launch": launch_without_an_end}
ROWS |= {"lock": keep_the_lock, "wait": wait, "last": dict}

def rows(setting):
    for name in os.environ["MADE_UP"].split():
        yield name, ROWS[name]

module = ModuleType("benchmarks.gpu.made_up")
module.rows = rows
sys.modules[module.__name__] = module
limit = float(os.environ.get("MADE_UP_LIMIT", "60"))
on_gpu.NAMED["made_up"] = on_gpu.Step("made_up", 1, limit, "made_up", "rows", True, "made up")
on_gpu.WORKER = (sys.executable, __file__)
supervision.WATCH_S = 0.1
if "--worker" in sys.argv:
    from benchmarks.gpu import journal
    journal.SECOND_LINE_S = 1
sys.exit(on_gpu.main())
'''


def begin(tmp_path: Path, rows: str, limit: float = 60.0) -> subprocess.Popen:
    script = tmp_path / "made_up.py"
    script.write_text(MADE_UP)
    env = supervision.environment("none", MADE_UP=rows, MADE_UP_LIMIT=str(limit))
    command = [sys.executable, str(script), "made_up", "--rehearse", "--out", "out"]
    return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def statuses(tmp_path: Path) -> dict[str, str]:
    return {key: row["status"] for key, row in held(tmp_path)["rows"].items()}


def held(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "made_up.json").read_text())


def test_a_lost_gpu_and_a_row_without_an_end(tmp_path: Path) -> None:
    process = begin(tmp_path, "lose hang last", limit=1.0)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, "a row of a check that was cut is wrong"
    assert statuses(tmp_path) == {"lose": "ok", "hang": "cut", "last": "ok"}
    assert held(tmp_path)["rows"]["hang"]["message"] == "took more than 1 s"
    assert held(tmp_path)["complete"]
    assert "the GPU was lost to this process: illegal memory access" in said
    assert ", in hang" in said or "in hang\n" in said, "where it waits is told"
    assert said.rstrip().endswith("cut  made_up: hang: took more than 1 s"), "the table is the end of the output"


@pytest.mark.slow
def test_everything_goes_wrong(tmp_path: Path) -> None:
    process = begin(tmp_path, "fine crash lose hang launch lock last", limit=1.0)
    said, _ = process.communicate(timeout=300)
    assert statuses(tmp_path) == {
        "fine": "ok", "crash": "cut", "lose": "ok", "hang": "cut", "launch": "cut", "lock": "cut", "last": "ok"
    }  # fmt: skip
    assert said.count("another one goes on") == 2 + 1 + 1 + 1 + 2, "a crash and a held lock are begun twice"


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, int, int]]:
    """A session in a row that waits: its process, and the ids of its worker and of what that has started."""
    process = begin(tmp_path, "wait")
    while not (tmp_path / "waiting").exists() or len((tmp_path / "waiting").read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    yield process, *map(int, (tmp_path / "waiting").read_text().split())
    process.kill()
    process.communicate()


def test_a_session_that_is_told_to_end(waiting: tuple, tmp_path: Path) -> None:
    process, worker, child = waiting
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, "nothing was wrong"
    assert "made_up: NOT COMPLETE" in said
    assert held(tmp_path)["rows"] == {"wait": {"status": "running", "attempts": 1}}
    assert gone(worker)
    assert gone(child)


def test_a_session_that_is_killed(waiting: tuple) -> None:
    """Nobody could tell the worker; it must not stay on the GPU."""
    process, worker, child = waiting
    os.kill(process.pid, signal.SIGKILL)
    assert gone(worker)
    assert gone(child)


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert on_gpu.main(["environment", "--out", str(tmp_path)]) == 1
    assert "no GPU here; --rehearse runs the same code without one" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_the_first_worker_drops_what_was_not_ok(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.touch()
    arguments = ["parity", "--out", str(tmp_path), "--again", "--minutes", "5", "--data", str(text)]
    options, steps = on_gpu.parsed(arguments)
    first, second = (on_gpu.command(steps, options, time.monotonic() + 60, number) for number in (0, 1))
    assert "--again" in first
    assert "--again" not in second
    again, same = on_gpu.parsed(second[3:])
    assert (same, again.out, again.data, again.worker) == (steps, tmp_path, text, True)
    assert 0.9 < again.minutes <= 1.0
