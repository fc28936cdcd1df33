"""Runs whose pool is spread over processes: what they save is what one process saves; torchrun on the CPU."""
# ruff: noqa: F401, F811 -- the fixture start

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from sprout import checkpoint as ck
from sprout import hub
from sprout.runs import checkpoints
from sprout.train_config import OptionError, TrainConfig
from sprout.train_loop import parameters
from sprout.trainer import Trainer
from tests.sharded_workers import grouped
from tests.test_train_distributed import SAME, WORKER, finishes, furthest, trains
from tests.test_train_resume import same
from tests.training import TINY, final, metrics, sample_text, start

GROUPS = ("--n_neurons", "208", "--connection", "block_sparse", "--block_size", "16", "--blocks_per_row", "3")
GROUPS += ("--active_groups", "3", "--window", "4")


def form(tree):
    """A checkpoint's state without its numbers."""
    tensors, rest = ck.flatten({**tree, "random": len(tree["random"]), "seconds": 0, "best": 0, "loss": 0})
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, rest


@pytest.mark.slow
def test_processes_come_and_go(tmp_path):
    """One process with a batch of 4, two with 2, then four with 1, one with 4 and two again: the same weights."""
    options = [*TINY, *GROUPS, "--data", sample_text(tmp_path / "text.txt"), *SAME]
    one, two = tmp_path / "one", tmp_path / "two"
    told = finishes(2, *options, "--out", str(two))
    finishes(1, *options, "--batch_size", "4", "--out", str(one))
    assert f"sprout: {final(one)['parameters']} parameters" in told
    for kind in ("train", "val"):
        records = [metrics(path, kind) for path in (one, two)]
        assert [r["loss"] for r in records[1]] == pytest.approx([r["loss"] for r in records[0]], rel=1e-4)
    for name in ("parameters", "parameters_without_embeddings", "tokens"):
        assert final(two)[name] == final(one)[name], name
    assert final(two)["val"]["targets"] == final(one)["val"]["targets"]
    saved = [ck.read(checkpoints(path)[-1]) for path in (one, two)]
    assert form(saved[0].state)[0] == form(saved[1].state)[0]
    assert form(saved[0].state)[1]["dict"][:2] == form(saved[1].state)[1]["dict"][:2]  # of the optimizers and windows
    assert furthest(one, two) < 2e-5
    assert parameters(hub.load(two)[0])[0] == final(one)["parameters"]
    assert (two / "samples.txt").read_text() == (one / "samples.txt").read_text()

    for processes, batch_size, steps in ((4, "1", "13"), (1, "4", "15"), (2, "2", "17")):
        more = ["--batch_size", batch_size, "--max_steps", steps]
        told = finishes(processes, "--resume", str(two), *more)
        assert told.count(f"now there are {processes}: from step ") == 1
        finishes(1, "--resume", str(one), "--max_steps", steps)
        assert furthest(one, two) < 2e-5
    assert final(two)["tokens"] == 17 * 4 * 4


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on_bitwise(tmp_path):
    more = ["--dropout", "0.1", "--optimizer", "muon", "--grad_accumulation", "2", "--freeze_strength"]
    options = [*TINY, *GROUPS, "--data", sample_text(tmp_path / "text.txt"), *more]
    code, told = trains(2, "die", *options, "--out", str(tmp_path / "parts"), module=WORKER)
    assert code != 0
    assert re.search(r"exitcode *: 3", told)
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["step-00000004"]
    assert "resumed at step 4" in finishes(2, "--resume", str(tmp_path / "parts"))
    finishes(2, *options, "--out", str(tmp_path / "whole"))
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_table_that_is_not_finite_ends_all_processes(tmp_path):
    """The bad number is in the rows of the second process; the first tells it too, and saves nothing."""
    options = [*TINY, *GROUPS, "--data", sample_text(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    code, told = trains(2, "spoil", *options, module=WORKER)
    assert code != 0
    assert told.count("error: the loss or a weight is not finite at step 8") == 2
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000004"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rewire_every", "5"], "--rewire_every 5 with --active_groups needs one process"),
        (["--mixed_precision", "fp16", "--device", "auto"], "--mixed_precision fp16 needs a single optimizer"),
    ],
)
def test_what_does_not_go_together_is_refused_first(tmp_path, start, capsys, monkeypatch, options, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert start("run", *GROUPS, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_trainer_made_in_code_refuses_it_too():
    plan: Any = SimpleNamespace(config=TrainConfig(rewire_every=5), sizes=grouped().config)
    with pytest.raises(OptionError, match="--rewire_every 5 with --active_groups needs one process"):
        Trainer(plan, SimpleNamespace(num_processes=2))  # type: ignore[arg-type]
