"""What is said about finished runs, and tasks learnt one after another."""

import csv
import json

import numpy as np
import pytest

pytest.importorskip("hydra")
pytest.importorskip("torchmetrics")

from biohama.experiments import continual, plot, report, table, train
from tests.training import reset

SPLITS = ("train", "id", "ood", "hard")
FLAGS = ["train.steps=4", "train.batch_size=2", "evaluation.sequences=3", "device=cpu"]


@pytest.fixture(autouse=True)
def _fresh():
    reset()
    yield
    reset()


def results(path):
    return json.loads((path / "results.json").read_text())


def test_a_report_of_tiny_runs(tmp_path):
    request = {
        "device": "cpu",
        "train": {"steps": 4, "batch_size": 2},
        "evaluation": {"sequences": 3, "splits": list(SPLITS)},
    }
    tiny = {"name": "biohama_tiny", "d_model": 16, "d_hidden": 16}
    for seed in (0, 1):
        for name, model in (("gru", "gru"), ("tiny", tiny)):
            train.train_one({**request, "model": model, "seed": seed, "out": str(tmp_path / f"runs/{name}{seed}")})
    page = report.write_report([tmp_path / "runs"], tmp_path / "out").read_text()
    whole = json.loads((tmp_path / "out/report.json").read_text())
    values = [results(tmp_path / f"runs/gru{seed}")["splits"]["id"] for seed in (0, 1)]
    (row,) = (r for r in whole["rows"] if (r["model"], r["split"]) == ("gru", "id"))
    assert row["perplexity"] == pytest.approx(np.median([v["perplexity"] for v in values]))
    assert row["perplexity_worst"] == max(v["perplexity"] for v in values)
    assert row["token_acc_worst"] == min(v["token_acc"] for v in values)
    assert row["sequences"] == 6
    with open(tmp_path / "out/report.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(whole["rows"]) == 8
    assert {(line["model"], line["seeds"]) for line in lines} == {("gru", "0 1"), ("biohama_tiny", "0 1")}
    pictures = {path.name for path in (tmp_path / "out/pictures").iterdir()}
    names = ("copy-by-length", "copy-biohama_tiny-stream")
    assert pictures == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert all(f"(pictures/{name}.png)" in page for name in names)
    assert [(c["split"], c["line"]) for c in whole["acceptance"]] == [
        ("train", 0.95),
        ("id", 0.9),
        ("ood", 0.7),
        ("hard", 0.2),
    ]


def test_the_report_tells_settings_apart_and_refuses_what_it_cannot_read(tmp_path, capsys):
    base = {"task": "t", "model": "m", "parameters": 1, "steps": 1, "train_seconds": 1.0, "splits": {}}
    figures = {
        "sequences": 2,
        "perplexity": 1.0,
        "token_acc": 1.0,
        "seq_acc_teacher_forced": 0.5,
        "by_length": [[2, 2, 1]],
    }
    made = [(0, {"lr": 1, "n": 2}, 0.5), (1, {"lr": 1, "n": 2}, 0.1), (2, {"lr": 1, "n": 2}, 0.4), (0, {"n": 2}, None)]
    for number, (seed, changes, value) in enumerate(made):
        (tmp_path / f"r{number}").mkdir()
        splits = {"id": {**figures, "seq_acc": value}}
        text = json.dumps({**base, "seed": seed, "changes": changes, "splits": splits})
        (tmp_path / f"r{number}/results.json").write_text(text)
    found = {row["model"]: row for row in report.rows(report.read_results([tmp_path]))}
    assert {name: (row["seq_acc"], row["seq_acc_worst"]) for name, row in found.items()} == {
        "m lr=1": (0.4, 0.1),
        "m": (None, None),
    }
    page = table.markdown(list(found.values()), [])
    assert "0.400 (0.100) |" in page
    assert "0.500 (0.500), teacher-forced |" in page
    with pytest.raises(report.ReportError, match="come more than once"):
        report.rows([dict(run, label="m") for run in report.read_results([tmp_path])])
    (tmp_path / "r0/results.json").write_text("{}")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "r0/results.json is damaged" in capsys.readouterr().err
    assert report.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_the_acceptance_line_is_above_the_best_baseline():
    def row(model, split, value):
        return {"task": "t", "model": model, "split": split, "seq_acc": value}

    rows = [row("lstm", "hard", 0.5), row("gru", "hard", 0.1), row("biohama", "hard", 0.69), row("biohama", "id", 0.95)]
    found = [(c["split"], c["line"], c["met"]) for c in table.acceptance(rows)]
    assert found == [("id", 0.9, True), ("hard", pytest.approx(0.7), False)]


def test_neighbouring_lengths_are_drawn_as_one_point():
    x, y = plot.binned([[3, 2, 1], [5, 2, 2], [9, 1, 0], [3, 1, 1]], 4)
    assert x == pytest.approx([(3 * 3 + 5 * 2) / 5, 9])
    assert y == pytest.approx([4 / 5, 0])


def test_forgetting_is_what_is_lost_since_the_best_stage():
    assert continual.forgetting([[0.9, 0.0, 0.1], [1.0, 0.8, 0.0], [0.4, 0.8, 1.0]]) == pytest.approx((0.6 + 0.0) / 2)
    assert continual.forgetting([[0.3]]) == 0.0
    assert set(continual.variants("biohama_tiny", True)) == {
        *("biohama_tiny", "biohama_tiny without hebb", "biohama_tiny dense router")
    }
    assert set(continual.variants("lstm", True)) == {"lstm"}


def test_tasks_one_after_another(tmp_path, capsys):
    line = [f"out={tmp_path}", "tasks=[copy,sort]", "models=[{name: gru, width: 16}]", *FLAGS]
    assert continual.main(line) == 0
    found = json.loads((tmp_path / "continual.json").read_text())
    (matrix,) = found["variants"]["gru"]["accuracy"]
    assert np.shape(matrix) == (2, 2)
    first, second = tmp_path / "gru-s0/1-copy", tmp_path / "gru-s0/2-sort"
    assert json.loads((second / "config.json").read_text())["experiment"]["init"] == str(first)
    assert matrix[1][1] == results(second)["splits"]["id"]["seq_acc"]
    stamp = (second / "results.json").stat().st_mtime_ns
    assert continual.main(line) == 0
    assert (second / "results.json").stat().st_mtime_ns == stamp
    assert (tmp_path / "continual.svg").exists()
    for wrong, said in (
        ("tasks=[copy,mqar]", "share one vocab_size"),
        ("split=easy", "easy"),
        ("seed=1", "seed cannot be given"),
    ):
        assert continual.main([*line, wrong]) == 2
        assert said in capsys.readouterr().err
