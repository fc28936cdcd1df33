"""A training run of a second or two, and what its folder holds."""

import json

import pytest
from accelerate.state import AcceleratorState, GradientState

from sprout import data, train
from sprout.runs import read_metrics

OPTIONS = (
    "--n_neurons 64 --d_state 16 --n_heads 2 --n_interaction_steps 2 --initial_sparsity 6 --final_sparsity 10 "
    "--recruits_per_step 2 --min_active 2 --n_encoder_layers 1 --batch_size 2 --window 8 --max_steps 10 --log_every 1 "
    "--eval_every 4 --eval_batches 2 --warmup_steps 2 --no-tensorboard --device cpu"
)
TINY = OPTIONS.split()


def sample_text(path):
    """A file of 800 characters of the corpus: 720 to train on, 80 to validate on."""
    path.write_text(data.corpus()[5000:5800], encoding="utf8")
    return str(path)


def reset():
    """Forgets the device and precision that accelerate keeps for the life of a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start("name", "--option", ...) trains in tmp_path/name; it gives the exit code."""
    monkeypatch.setattr("sprout.train_loop.SAMPLE_TOKENS", 8)  # drawing is a large part of so short a run
    source = sample_text(tmp_path / "text.txt")

    def run(name, *more):
        reset()
        return train.main([*TINY, "--data", source, "--out", str(tmp_path / name), *more])

    yield run
    reset()


def metrics(path, kind):
    """The records of one kind, "train" or "val"."""
    return [record for record in read_metrics(path) if record["kind"] == kind]


def final(path):
    return json.loads((path / "final.json").read_text())
