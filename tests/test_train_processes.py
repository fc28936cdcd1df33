"""A run continued by another number of processes, as far as one can show it; see also test_train_distributed."""
# ruff: noqa: F401, F811 -- the fixture start

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sprout import checkpoint as ck
from sprout import train
from sprout.runs import checkpoints, random_state, seed_everything
from sprout.train_config import OptionError, TrainConfig, continue_with, merge
from sprout.trainer import Trainer
from tests.training import final, reset, start


def draws(rank, processes, states, step=7, seed=0):
    """Numbers that a process draws after it has been restored."""
    trainer = object.__new__(Trainer)
    trainer.config, trainer.step = TrainConfig(seed=seed), step
    trainer.accelerator = SimpleNamespace(process_index=rank, num_processes=processes, is_main_process=rank == 0)
    trainer._restore_random(states)
    return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002


def test_random_states_that_exist_are_kept_and_new_ones_are_seeded(caplog):
    states, expected = [], []
    for seed in (11, 12):
        seed_everything(seed)
        states.append(random_state())
        expected.append((random.random(), np.random.random(), torch.rand(1).item()))  # noqa: NPY002
    assert [draws(rank, 2, states) for rank in range(2)] == expected
    assert not caplog.text
    assert draws(0, 1, states) == expected[0]
    assert "the checkpoint is of 2 processes, now there are 1: from step 7 on the run is not bitwise" in caplog.text
    of_four = [draws(rank, 4, states) for rank in range(4)]
    assert of_four[:2] == expected
    assert of_four == [draws(rank, 4, states) for rank in range(4)]
    others = [draws(2, 4, states, step=8), draws(2, 4, states, seed=1)]
    assert len({*of_four, *others}) == 6
    assert caplog.text.count("now there are 4") == 2  # of the main process only, twice


def test_the_batch_of_a_process_may_change_with_their_number():
    stored = merge({"batch_size": 4, "grad_accumulation": 2}, {})
    assert continue_with({"batch_size": 2}, stored, 1, 2)["batch_size"] == 2
    assert continue_with({"batch_size": 8, "grad_accumulation": 3}, stored, 3, 1)["grad_accumulation"] == 3
    assert continue_with({}, stored, 1, 2) == stored
    with pytest.raises(
        OptionError, match=r"--batch_size 3 x --grad_accumulation 2 x 2 processes make 12 windows .* 8;"
    ):
        continue_with({"batch_size": 3}, stored, 1, 2)
    with pytest.raises(OptionError, match="--batch_size 2 cannot be changed on --resume"):
        continue_with({"batch_size": 2, "grad_accumulation": 4}, stored, 2, 2)
    with pytest.raises(OptionError, match=r"--lr 0\.5 cannot be changed on --resume"):
        continue_with({"lr": 0.5}, stored, 1, 2)


def test_a_run_of_two_processes_goes_on_with_one(tmp_path, start, caplog, capsys, monkeypatch):
    run = tmp_path / "run"
    assert start("run", "--max_steps", "2") == 0
    file = run / "config.json"
    request = json.loads(file.read_text())
    assert request["processes"] == 1
    file.write_text(json.dumps({**request, "processes": 2}))
    found = ck.read(checkpoints(run)[-1])
    found.state["random"] *= 2
    ck.write(found.path, found)

    def resume(*options):
        reset()
        caplog.clear()
        return train.main(["--resume", str(run), *options])

    assert resume("--batch_size", "3") == 2
    assert "3 x --grad_accumulation 1 x 1 processes make 3 windows per step, the run has 4" in capsys.readouterr().err
    assert json.loads(file.read_text())["processes"] == 2
    assert resume("--max_steps", "3") == 0
    assert "a step takes 2 windows instead of 4, at the same lr: the run had 2 processes, now 1" in caplog.text
    assert "the checkpoint is of 2 processes, now there are 1: from step 2 on" in caplog.text
    assert json.loads(file.read_text())["processes"] == 1
    file.write_text(json.dumps({**json.loads(file.read_text()), "processes": 2}))
    monkeypatch.setenv("RANK", "1")  # only one process tells it
    assert resume() == 0
    assert "instead of" not in caplog.text
    assert final(run)["steps"] == 3
