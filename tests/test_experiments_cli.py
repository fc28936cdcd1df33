"""The commands of the experiments: one run, many, and all parts at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("hydra")
pytest.importorskip("torchmetrics")

from biohama.experiments import __main__ as cli
from biohama.experiments import config, evaluate, quick, report, suite, train
from sprout.runs import checkpoints, read_metrics
from tests.training import reset

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["train.steps=4", "train.batch_size=2", "train.log_every=1", "evaluation.sequences=3", "device=cpu"]
FLAGS += ["train.tensorboard=false"]
GRU = ["model=gru", "model.width=16"]
SLOW = ["task=copy", "model=gru", "train.steps=100000", "train.log_every=1", "train.batch_size=2", "device=cpu"]


@pytest.fixture(autouse=True)
def _fresh():
    reset()
    yield
    reset()


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def results(path):
    return json.loads((path / "results.json").read_text())


def refused(capsys, *arguments):
    """(exit code, what was said) of a command line that does not run."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code, capsys.readouterr().err


def test_one_run_from_the_command_line_leaves_nothing_beside_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(
        [
            *GRU,
            *FLAGS,
            "task=mqar",
            "task.options.vocab_size=32",
            "task.options.power_a=0.5",
            "out=x",
            "seed=3",
            "task.options.lengths={train: 16, id: 20}",
            "task.options.pairs={train: [1, 2], id: [2, 3]}",
        ]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    found = results(tmp_path / "x")
    assert (found["task"], found["model"], found["seed"], set(found["splits"])) == ("mqar", "gru", 3, {"train", "id"})
    reset()
    cli.main(["resume=x", "evaluation.sequences=5", "evaluation.splits=[id]"])
    assert results(tmp_path / "x")["splits"]["id"]["sequences"] == 5
    assert evaluate.main(["x", "evaluation.sequences=6"]) == 0
    assert results(tmp_path / "x")["splits"]["id"]["sequences"] == 6


def test_a_task_is_named_by_its_class(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from biohama.tasks import Copy\nclass Mine(Copy):\n splits = 'train', 'id'\n def __init__(self, x): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, task in (("a", ["task=mine:Mine"]), ("b", ["task=custom", "task.name='mine:Mine'"])):
        reset()
        cli.main([*task, "task.options.x=3", *GRU, *FLAGS, f"out={tmp_path / name}"])
        assert results(tmp_path / name)["task"] == "mine.Mine"
    assert results(tmp_path / "a")["splits"] == results(tmp_path / "b")["splits"]


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        ("train.stepz=3", 1, ["train.stepz", "not in 'TrainOptions'"]),
        ("model.widht=3", 1, ["model.widht"]),
        ("model=lstmm", 1, ["model/lstmm", "transformer_rope"]),
        ("task=copi", 1, ["task/copi", "recall"]),
        ("train.steps=some", 1, ["train.steps", "'some'"]),
        ("train.steps=0", 2, ["error: train.steps must be an integer >= 1, got 0"]),
        ("model.width=-1", 2, ["error: model.width must be an integer >= 0, got -1"]),
        ("task.options.x=3", 2, ["error: task: options of 'copy'", "'x'"]),
        ("task=nowhere:Task", 2, ["the module 'nowhere' cannot be imported"]),
        ("resume=nowhere", 2, ["nowhere is not a run folder"]),
    ],
)
def test_wrong_options_are_refused_and_leave_nothing(tmp_path, monkeypatch, capsys, wrong, code, words):
    monkeypatch.chdir(tmp_path)
    found, said = refused(capsys, *(GRU if "model=" not in wrong else []), "out=x", wrong)
    assert found == code, said
    assert all(word in said for word in words), said
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_cannot_become_another_one(tmp_path, capsys):
    cli.main([*GRU, *FLAGS, f"out={tmp_path / 'x'}"])
    code, said = refused(capsys, f"resume={tmp_path / 'x'}", "train.lr=0.1")
    assert code == 2
    assert "train.lr cannot be changed from 0.0015 to 0.1: it would be another run" in said
    code, said = refused(capsys, *GRU, *FLAGS, f"out={tmp_path / 'x'}")
    assert (code, "is not empty (continue it with resume=" in said) == (2, True)


def test_multirun(tmp_path):
    command = [
        sys.executable,
        "-m",
        "biohama.experiments",
        "-m",
        *GRU,
        *FLAGS,
        "task=copy,sort",
        "seed=0,1",
        "out=many",
    ]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    found = {tuple(path.parent.name.split("-")[:3]) for path in (tmp_path / "many").glob("*/results.json")}
    assert found == {(task, "gru", seed) for task in ("copy", "sort") for seed in ("s0", "s1")}
    assert [path.name for path in tmp_path.iterdir()] == ["many"]
    assert len(list((tmp_path / "many").iterdir())) == 5
    assert [path.name for path in (tmp_path / "many/.hydra").iterdir()] == ["multirun.yaml"]


def launched(command, folder, runs):
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if sum(len(read_metrics(path.parent)) >= 3 for path in folder.rglob("metrics.jsonl")) == runs:
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"it did not start: {process.communicate()[1]}")


def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path):
    command = [sys.executable, "-m", "biohama.experiments", *SLOW, f"out={tmp_path / 'x'}"]
    process = launched(command, tmp_path, 1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert int(checkpoints(tmp_path / "x")[-1].name[5:]) == read_metrics(tmp_path / "x")[-1]["step"]
    assert not (tmp_path / "x/lock").exists()


def test_a_suite_is_stopped_and_finished_by_the_same_command(tmp_path, capsys):
    grid = [f"out={tmp_path}", "tasks=[copy,recall]", "models=[gru]", "jobs=2", "device=cpu", "train.batch_size=2"]
    grid += ["train.log_every=1", "evaluation.sequences=3", "evaluation.splits=[id]"]
    process = launched([sys.executable, "-m", "biohama.experiments.suite", *grid, "train.steps=9000"], tmp_path, 2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) is not None
    assert process.returncode == 130
    steps = {path.name: int(checkpoints(path)[-1].name[5:]) for path in tmp_path.iterdir() if path.is_dir()}
    assert len(steps) == 2
    assert min(steps.values()) >= 3


def test_a_suite_runs_what_is_missing_and_goes_on_after_a_failure(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    caplog.set_level("INFO")
    grid = [f"out={tmp_path}", "tasks=[copy]", "models=[gru,lstm]", *FLAGS, "evaluation.splits=[id]"]
    (tmp_path / "copy-gru-s0-train.steps=4-train.batch_size=2").mkdir()
    (tmp_path / "copy-gru-s0-train.steps=4-train.batch_size=2" / "something").write_text("")
    assert suite.main(grid) == 1
    assert "copy-gru-s0-train.steps=4-train.batch_size=2: exit code 1" in caplog.text
    assert "is not empty" in caplog.text
    (tmp_path / "copy-gru-s0-train.steps=4-train.batch_size=2" / "something").unlink()
    before = results(tmp_path / "copy-lstm-s0-train.steps=4-train.batch_size=2")
    assert suite.main(grid) == 0
    assert "2 runs, 1 of them are done" in caplog.text
    assert results(tmp_path / "copy-lstm-s0-train.steps=4-train.batch_size=2") == before
    assert len(report.read_results([tmp_path])) == 2
    for wrong, said in (
        ("jobs=0", "jobs must be"),
        ("models=[x]", "model must be"),
        ("train.x=1", "train.x"),
        ("y", "KEY=VALUE"),
    ):
        assert suite.main([*grid, wrong]) == 2
        assert said in capsys.readouterr().err


def test_quick_shows_every_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quick, "STEPS", 20)
    monkeypatch.setitem(quick.OPTIONS, "train", {**quick.OPTIONS["train"], "steps": 20, "save_every": 5})
    monkeypatch.setitem(quick.OPTIONS, "evaluation", {"sequences": 4, "splits": ["id"]})
    assert quick.main(["--out", str(tmp_path / "q")]) == 0
    said = capsys.readouterr().out
    for words in (
        "hebbian ",
        "trace.router",
        "cut off; going on",
        "ended with the same bits",
        "free running",
        "every part works",
    ):
        assert words in said
    assert (tmp_path / "q/report/report.md").exists()
    assert config.make_config(quick.OPTIONS).train.steps == 20


def test_accelerates_own_configuration_brings_no_autocast(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    made = train.make_accelerator(config.make_config({"device": "cpu"}))
    assert made.mixed_precision == "no"
