"""A run's folder: its files, who may write it, and how a process is told to end."""

import json
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest
import torch

from sprout import disk, runs
from sprout.runs import LockError, RunError, RunFolder
from tests.saved import in_child, some


@pytest.fixture
def run(tmp_path):
    with RunFolder.create(tmp_path / "run", {"lr": 1}) as folder:
        yield folder


def test_an_existing_folder_is_refused(tmp_path, run):
    with pytest.raises(RunError, match=r"run exists and is not empty \(continue it with --resume .*run\)"):
        RunFolder.create(run.path, {})
    other = tmp_path / "other"
    other.mkdir()
    with RunFolder.create(other, {}):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="file is a file; name a new folder with --out"):
        RunFolder.create(tmp_path / "file", {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(RunError, match="it is not a run's"):
        RunFolder.create(tmp_path / "mine", {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run folder: .*config.json is missing"),
        ("{", "config.json is damaged"),
        ("[]", "config.json is damaged"),
        ('{"format": 99}', "config.json has format 99, this version reads 1"),
    ],
)
def test_what_is_not_a_run_cannot_be_resumed(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=message):
        RunFolder.resume(tmp_path)
    assert not (tmp_path / "lock").exists()


def test_the_config_is_kept_and_can_be_replaced(run):
    assert run.config == {"lr": 1}
    run.configure({"lr": 2})
    assert run.config == {"lr": 2}
    assert json.loads((run.path / "config.json").read_text())["format"] == runs.FORMAT


def test_metrics_lose_what_came_later_and_what_was_cut_off(run):
    for step in (1, 2, 3, 4):
        run.log(step, kind="train", loss=1 / step)
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4]
    run.save(some(2))
    run.rewind()
    run.log(3, kind="train", loss=9.0)
    assert [(record["step"], record["loss"]) for record in run.metrics()] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    (run.path / "metrics.jsonl").write_text('{"step": 1}\nxx\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2 is damaged"):
        run.metrics()


def test_a_second_process_is_refused_by_host_and_pid(run):
    code = f"from sprout.runs import RunFolder; RunFolder.resume({str(run.path)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"process {os.getpid()} on this host ({socket.gethostname()}) writes there; end it first" in ended.stderr
    with pytest.raises(LockError, match="end it first"):
        RunFolder.resume(run.path, force=True)


def foreign(**changes):
    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    return json.dumps({**own, **changes})


def test_a_dead_process_loses_its_lock(run, caplog):
    run.close()
    assert in_child(lambda: (disk.Lock(run.path / "lock"), os._exit(0))) == 0
    assert (run.path / "lock").exists()
    RunFolder.resume(run.path).close()
    assert "taking over" in caplog.text
    (run.path / "lock").write_text(foreign(started=1.0))  # the pid lives, but it is a younger process's now
    RunFolder.resume(run.path).close()
    assert not list(run.path.glob("lock*"))


def test_force_takes_a_foreign_lock(run):
    run.close()
    (run.path / "lock").write_text(foreign(host="elsewhere", pid=12))
    with pytest.raises(LockError, match="process 12 on host elsewhere writes there; if it is gone, use --force"):
        RunFolder.resume(run.path)
    RunFolder.resume(run.path, force=True).close()
    (run.path / "lock").write_text("")
    with pytest.raises(LockError, match="not readable as a lock"):
        RunFolder.resume(run.path)
    RunFolder.resume(run.path, force=True).close()


def test_a_lock_that_changes_hands_while_it_is_judged_is_put_back(run, monkeypatch):
    run.close()
    (run.path / "lock").write_text(foreign(started=1.0))
    newer = foreign(host="elsewhere")

    def judged(self, text, force):
        self.path.write_text(newer)

    monkeypatch.setattr(disk.Lock, "_refusal", judged)
    with pytest.raises(LockError, match="was taken by another process a moment ago"):
        RunFolder.resume(run.path)
    assert (run.path / "lock").read_text() == newer


def test_a_lock_taken_by_another_is_left_alone(run):
    (run.path / "lock").write_text(foreign(host="elsewhere"))
    run.close()
    assert (run.path / "lock").exists()


def test_every_start_is_recorded(run):
    facts = runs.environment(3, "cpu")
    run.record_start(0, facts)
    run.record_start(4, facts)
    starts = json.loads((run.path / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 4]
    assert starts[0]["seed"] == 3
    assert starts[0]["versions"]["torch"] == torch.__version__
    assert set(starts[0]) == {"step", "seed", "versions", "git", "device", "threads", "platform"}


def test_a_signal_becomes_a_flag(caplog):
    before = signal.getsignal(signal.SIGTERM)
    with runs.Interrupt() as stop:
        assert stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code == 143
    assert "SIGTERM: finishing the step" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_signal_ends_the_process():
    def twice():
        with runs.Interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)

    assert in_child(twice) == 130
