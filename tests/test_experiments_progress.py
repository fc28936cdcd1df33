"""What a run tells while it runs."""

import pytest

pytest.importorskip("hydra")
pytest.importorskip("torchmetrics")

from biohama.experiments import train
from sprout.runs import read_metrics
from tests.test_experiments import TRAIN, _fresh, options  # noqa: F401, a fixture


def test_tensorboard_files_hold_the_metrics(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.train_one(options(tmp_path / "run", train={**TRAIN, "tensorboard": True}))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    written = {kind: [r for r in read_metrics(tmp_path / "run") if r["kind"] == kind] for kind in ("train", "check")}
    for tag, kind, name in (("train/loss", "train", "loss"), ("check/seq_acc", "check", "seq_acc")):
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)] == [
            (r["step"], r[name]) for r in written[kind]
        ]
        assert written[kind]


def test_without_a_terminal_there_is_no_bar_and_with_one_it_counts_the_steps(tmp_path, monkeypatch, capsys):
    train.train_one(options(tmp_path / "dumb"))
    assert "step/s" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train.train_one(options(tmp_path / "tty"))
    assert "12/12" in capsys.readouterr().err
