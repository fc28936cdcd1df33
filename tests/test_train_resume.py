"""An interrupted run goes on to bitwise the same weights; what would make it another run is refused."""
# ruff: noqa: F401, F811 -- the fixture start

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sprout import checkpoint as ck
from sprout import train
from sprout.runs import Interrupt, checkpoints, read_metrics
from sprout.train_loop import Loop
from sprout.trainer import Trainer
from tests.training import TINY, final, metrics, reset, sample_text, start

ROOT = Path(__file__).resolve().parents[1]


def resume(path, *more):
    reset()
    return train.main(["--resume", str(path), *more])


def at_step(monkeypatch, step, action):
    """Does something right after a step was taken, once."""
    before = Trainer.train_step

    def stepped(self):
        facts = before(self)
        if self.step == step:
            monkeypatch.setattr(Trainer, "train_step", before)
            action()
        return facts

    monkeypatch.setattr(Trainer, "train_step", stepped)


def interrupt(monkeypatch, step, number=signal.SIGTERM):
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))


def same(a, b):
    """Asserts that two runs ended with the same bits: weights, optimizer, generators and what was measured."""
    last = [ck.read(checkpoints(path)[-1]) for path in (a, b)]
    assert last[0].step == last[1].step
    trees = [[dict(sorted(found.weights.items())), {**found.state, "seconds": 0}] for found in last]
    flat = [ck.flatten(tree) for tree in trees]
    assert flat[0][1] == flat[1][1]
    assert flat[0][0].keys() == flat[1][0].keys()
    assert len(flat[0][0]) > 20
    for name, tensor in flat[0][0].items():
        assert torch.equal(tensor, flat[1][0][name]), name
    timed = {"seconds", "tokens_per_second"}
    records = [[{k: v for k, v in r.items() if k not in timed} for r in read_metrics(path)] for path in (a, b)]
    assert records[0] == records[1]


WAYS = {
    "adamw": "",
    "muon": "--optimizer muon --dropout 0.1 --plasticity 0.1,oja --grad_accumulation 2",
    "gpt": "--model gpt",
    "groups": "--connection block_sparse --block_size 16 --blocks_per_row 2 --active_groups 2 --grad_accumulation 2",
    "rewired": "--connection block_sparse --block_size 16 --blocks_per_row 2 --rewire_every 2 --plasticity 0.1",
    "bf16": "--mixed_precision bf16 --connection block_sparse --block_size 16 --blocks_per_row 2",
}


@pytest.mark.parametrize("way", WAYS)
def test_ten_steps_are_five_and_five(tmp_path, start, monkeypatch, way):
    assert start("whole", *WAYS[way].split()) == 0
    interrupt(monkeypatch, 5)
    assert start("parts", *WAYS[way].split()) == 143
    assert checkpoints(tmp_path / "parts")[-1].name == "step-00000005"
    assert not (tmp_path / "parts/final.json").exists()
    assert resume(tmp_path / "parts") == 0
    same(tmp_path / "whole", tmp_path / "parts")
    starts = json.loads((tmp_path / "parts/environment.json").read_text())
    assert [entry["step"] for entry in starts] == [0, 5]


@pytest.mark.parametrize("step", [4, 10], ids=["before an evaluation", "before the end"])
def test_an_evaluation_that_a_signal_prevented_is_made_up(tmp_path, start, monkeypatch, step):
    assert start("whole") == 0
    interrupt(monkeypatch, step, signal.SIGINT)
    assert start("parts") == 130
    assert step not in [record["step"] for record in metrics(tmp_path / "parts", "val")]
    assert resume(tmp_path / "parts") == 0
    same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_lost_its_process_and_its_newest_checkpoint(tmp_path, start, monkeypatch, caplog):
    """What SIGKILL leaves: records after the last checkpoint, half a line, a lock, half a checkpoint."""
    assert start("whole") == 0

    def killed():
        raise KeyboardInterrupt

    at_step(monkeypatch, 9, killed)
    with pytest.raises(KeyboardInterrupt):
        start("parts")
    parts = tmp_path / "parts"
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "ki')
    (parts / "checkpoints/step-00000012.tmp").mkdir()
    weights = parts / "checkpoints/step-00000008/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert resume(parts) == 0
    assert "model.safetensors is incomplete" in caplog.text
    assert "falling back to step 4" in caplog.text
    same(tmp_path / "whole", parts)


def test_a_run_without_a_checkpoint_starts_again(tmp_path, start, monkeypatch, caplog):
    assert start("whole") == 0

    def killed():
        raise KeyboardInterrupt

    at_step(monkeypatch, 2, killed)
    with pytest.raises(KeyboardInterrupt):
        start("parts")
    assert resume(tmp_path / "parts") == 0
    assert "no checkpoint yet: starting from step 0" in caplog.text
    same(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_can_be_lengthened(tmp_path, start):
    assert start("run") == 0
    assert resume(tmp_path / "run") == 0  # nothing to do: the same end
    assert [record["step"] for record in metrics(tmp_path / "run", "val")] == [4, 8, 10]
    assert resume(tmp_path / "run", "--max_steps", "12") == 0
    assert final(tmp_path / "run")["steps"] == 12
    assert [record["step"] for record in metrics(tmp_path / "run", "train")] == list(range(1, 13))
    assert resume(tmp_path / "run") == 0  # the new length is kept
    assert final(tmp_path / "run")["steps"] == 12


def test_what_would_be_another_run_is_refused(tmp_path, start, capsys):
    assert start("run", "--max_steps", "1") == 0
    for name, value in {"lr": "0.5", "n_neurons": "32", "seed": "1", "model": "gpt", "window": "4"}.items():
        assert resume(tmp_path / "run", f"--{name}", value) == 2
        assert f"--{name} {value} cannot be changed on --resume" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("x" * 1000)
    assert resume(tmp_path / "run") == 2
    assert "has changed since" in capsys.readouterr().err
    moved = sample_text(tmp_path / "moved.txt")
    assert resume(tmp_path / "run", "--data", moved) == 0


def test_another_number_of_threads_is_told(tmp_path, start, caplog, monkeypatch):
    assert start("run", "--max_steps", "1") == 0
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert resume(tmp_path / "run") == 0
    assert f"the run had threads {threads}, now {threads + 1}: the weights may differ" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
        (lambda run: (run / "config.json").unlink(), "is not a run folder"),
        (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda run: (run / "tokenizer.json").write_text("{"), "tokenizer.json does not describe a tokenizer"),
        (lambda run: (run / "config.json").write_text('{"format": 1}'), "lacks 'options': it is not a run of"),
    ],
)
def test_folders_that_cannot_be_resumed(tmp_path, start, capsys, change, message):
    assert start("run", "--max_steps", "1") == 0
    change(tmp_path / "run")
    assert resume(tmp_path / "run") == 2
    assert message in capsys.readouterr().err


def test_only_damaged_checkpoints_end_the_run(tmp_path, start, capsys):
    assert start("run", "--max_steps", "1") == 0
    for path in checkpoints(tmp_path / "run"):
        (path / "manifest.json").write_text("")
    assert resume(tmp_path / "run") == 1
    assert "has no checkpoint that can be read: " in capsys.readouterr().err


def test_a_full_disk_ends_the_run_with_the_last_checkpoint(tmp_path, start, monkeypatch, capsys):
    import errno

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    at_step(monkeypatch, 6, lambda: monkeypatch.setattr("sprout.checkpoint.write_synced", full))
    assert start("run") == 1
    told = capsys.readouterr().err
    assert "disk full: " in told
    assert "step-00000008" in told
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000004"]
    monkeypatch.undo()
    assert resume(tmp_path / "run") == 0
    assert final(tmp_path / "run")["steps"] == 10


def test_a_signal_before_the_first_batch_of_an_evaluation(tmp_path, start, monkeypatch):
    before = Loop._evaluate

    def interrupted(self, limit):
        os.kill(os.getpid(), signal.SIGTERM)
        return before(self, limit)

    monkeypatch.setattr(Loop, "_evaluate", interrupted)
    assert start("run") == 143
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000004"]


def launch(out, source, *more):
    """A run of its own process, that goes on for long, once it has taken three steps."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sprout.train", *TINY, "--data", source, "--out", str(out)]
    command += ["--max_steps", "100000", "--eval_every", "100000", *more]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len(read_metrics(out)) >= 3:
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the run did not start: {process.communicate()[1]}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_process_with_a_checkpoint(tmp_path, number, code):
    process = launch(tmp_path / "run", sample_text(tmp_path / "text.txt"))
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == code, told
    assert "finishing the step and saving" in told
    assert "Traceback" not in told
    found = ck.read(checkpoints(tmp_path / "run")[-1])
    assert found.step == read_metrics(tmp_path / "run")[-1]["step"] >= 3
    assert not (tmp_path / "run/lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1, 0.23, 0.31])
def test_a_killed_process_can_be_resumed(tmp_path, delay):
    """SIGKILL at a moment of chance, while every step is saved: what is there loads, and the run goes on."""
    process = launch(tmp_path / "run", sample_text(tmp_path / "text.txt"), "--save_every", "1")
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=60)
    reached = max(int(path.name[5:]) for path in checkpoints(tmp_path / "run"))
    assert reached >= 2
    assert resume(tmp_path / "run", "--max_steps", str(reached + 2)) == 0
    assert final(tmp_path / "run")["steps"] == reached + 2


def test_a_second_process_is_refused(tmp_path, start, capsys, monkeypatch):
    code = []
    at_step(monkeypatch, 1, lambda: code.append(second(tmp_path / "run")))
    assert start("run", "--max_steps", "2") == 0
    assert code[0][0] == 2
    assert f"process {os.getpid()} on this host" in code[0][1]
    assert "end it first" in code[0][1]


def second(path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sprout.train", "--resume", str(path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stderr
