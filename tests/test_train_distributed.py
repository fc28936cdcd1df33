"""Several processes that train as one: plain data parallelism by torchrun, on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sprout import checkpoint as ck
from sprout.runs import checkpoints
from tests.test_train_resume import same
from tests.training import TINY, final, metrics, sample_text

ROOT = Path(__file__).resolve().parents[1]
# The balance is of a process's own batch, and a periodic evaluation counts in batches: here it takes all.
SAME = ("--balance", "0", "--eval_batches", "100", "--plasticity", "0.1,oja")
WORKER = "tests.train_worker"
pytestmark = pytest.mark.slow


def trains(processes, *options, module="sprout.train"):
    """A run of so many processes, which ends the test where it hangs. Returns: (exit code, what it said)."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", module, *options]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    return ended.returncode, ended.stderr


def finishes(processes, *options, **how):
    """What a run that ends well says."""
    code, told = trains(processes, *options, **how)
    assert code == 0, told
    return told


def weights(path):
    """Of the last checkpoint, without the bias of an attention's keys.

    Its gradient is zero but for rounding, which Adam makes as large as any other.
    """
    found = ck.read(checkpoints(path)[-1]).weights
    for name in [name for name in found if name.endswith("in_proj_bias")]:
        query, _, value = found.pop(name).chunk(3)
        found |= {f"{name} of queries": query, f"{name} of values": value}
    return found


def furthest(a, b):
    """The largest difference of the weights of two runs."""
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    return max(float((weight - theirs[name]).abs().max()) for name, weight in ours.items())


def test_processes_come_and_go(tmp_path):
    """One process with a batch of 4, two with 2, then four with 1 and one with 4 again: the same weights."""
    options = [*TINY, "--data", sample_text(tmp_path / "text.txt"), *SAME]
    one, two = tmp_path / "one", tmp_path / "two"
    finishes(2, "none", *options, "--out", str(two), module=WORKER)
    finishes(1, *options, "--batch_size", "4", "--out", str(one))
    assert final(two)["tokens"] == final(one)["tokens"] == 10 * 4 * 8
    for kind in ("train", "val"):
        records = [metrics(path, kind) for path in (one, two)]
        assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]]
        assert [r["loss"] for r in records[1]] == pytest.approx([r["loss"] for r in records[0]], rel=1e-4)
    for name in ("targets", "active_min", "active_max", "used_share"):
        assert final(two)["val"][name] == pytest.approx(final(one)["val"][name], rel=0.05), name
    assert furthest(one, two) < 2e-5
    strengths = [torch.load(f"{two}.{rank}") for rank in range(2)]
    assert torch.equal(*strengths)
    assert strengths[0].abs().max() > 0.1

    code, told = trains(4, "--resume", str(two), "--batch_size", "4")
    assert code != 0
    assert "--batch_size 4 x --grad_accumulation 1 x 4 processes make 16 windows per step, the run has 4" in told
    for processes, batch_size, steps in ((4, "1", "13"), (1, "4", "16")):
        more = ["--batch_size", batch_size, "--max_steps", steps]
        told = finishes(processes, "--resume", str(two), *more)
        assert told.count(f"now there are {processes}: from step ") == 1
        assert "windows instead of" not in told
        finishes(1, "--resume", str(one), "--max_steps", steps)
        assert furthest(one, two) < 2e-5
    assert final(two)["tokens"] == 16 * 4 * 8


def test_plasticity_of_each_process_alone_is_noticed(tmp_path):
    """The negative control: without joining, the comparisons of the test above fail."""
    options = [*TINY, "--data", sample_text(tmp_path / "text.txt"), *SAME]
    one, apart = tmp_path / "one", tmp_path / "apart"
    finishes(2, "apart", *options, "--out", str(apart), module=WORKER)
    finishes(1, *options, "--batch_size", "4", "--out", str(one))
    assert furthest(one, apart) > 1e-3
    assert not torch.equal(torch.load(f"{apart}.0"), torch.load(f"{apart}.1"))


def test_a_process_that_dies_ends_the_run_which_goes_on_bitwise(tmp_path):
    options = [*TINY, "--data", sample_text(tmp_path / "text.txt"), "--dropout", "0.1", "--plasticity", "0.1"]
    code, told = trains(2, "die", *options, "--out", str(tmp_path / "parts"), module=WORKER)
    assert code != 0
    assert re.search(r"exitcode *: 3", told)
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["step-00000004"]
    assert ck.read(checkpoints(tmp_path / "parts")[0]).step == 4
    assert not (tmp_path / "parts/final.json").exists()
    told = finishes(2, "--resume", str(tmp_path / "parts"))
    assert "resumed at step 4" in told
    assert "not bitwise" not in told
    finishes(2, *options, "--out", str(tmp_path / "whole"))
    same(tmp_path / "whole", tmp_path / "parts")
