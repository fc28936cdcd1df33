"""Two processes that train as one: plain data parallelism by torchrun, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import TINY, final, metrics, sample_text

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def trains(processes, *options):
    """A run of so many processes. Returns: (exit code, what it said)."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "sprout.train", *options]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return ended.returncode, ended.stderr


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    source = sample_text(tmp_path / "text.txt")
    # The balance is of a process's own batch, and a periodic evaluation counts in batches: here it takes all.
    options = [*TINY, "--data", source, "--balance", "0", "--eval_batches", "100"]
    code, told = trains(2, *options, "--out", str(tmp_path / "two"))
    assert code == 0, told
    code, told = trains(1, *options, "--batch_size", "4", "--out", str(tmp_path / "one"))
    assert code == 0, told
    one, two = tmp_path / "one", tmp_path / "two"
    assert final(two)["tokens"] == final(one)["tokens"] == 10 * 4 * 8
    for kind in ("train", "val"):
        records = [metrics(path, kind) for path in (one, two)]
        assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]]
        assert [r["loss"] for r in records[1]] == pytest.approx([r["loss"] for r in records[0]], rel=1e-4)
    for name in ("targets", "active_min", "active_max", "used_share"):
        assert final(two)["val"][name] == pytest.approx(final(one)["val"][name], rel=0.05), name

    code, told = trains(1, "--resume", str(two), "--max_steps", "12")
    assert code == 1
    assert "was made by 2 processes, not 1; resume with as many" in told
    code, told = trains(2, "--resume", str(two), "--max_steps", "12")
    assert code == 0, told
    assert final(two)["steps"] == 12


def test_plasticity_is_refused(tmp_path):
    source = sample_text(tmp_path / "text.txt")
    code, told = trains(2, *TINY, "--data", source, "--plasticity", "0.1", "--out", str(tmp_path / "run"))
    assert code != 0
    assert "--plasticity with more than one process is not supported yet; use one process" in told
    assert not (tmp_path / "run").exists()
