"""The ablation's runs, and its table."""

import json

import pytest

pytest.importorskip("hydra")
pytest.importorskip("torchmetrics")

from biohama.experiments import ablation, continual, suite
from biohama.objective import PARTS

QUICK = ["train.steps=2", "train.batch_size=2", "train.tensorboard=false", "device=cpu"]
QUICK += ["evaluation.sequences=2", "evaluation.splits=[id]"]


def test_every_case_takes_its_part_out_and_nothing_else():
    runs = ablation.Ablation("x", seeds=[0, 1]).runs()
    whole = {task: config for case, task, config in runs if case.name == "the whole"}
    for case, task, config in runs:
        assert config.task == whole[task].task
        assert config.train.steps == (3000 if task == "all_four" else 1200)
        then, now = (vars(c.model) | vars(c.train) for c in (whole[task], config))
        differing = {key for key in then if then[key] != now[key]}
        assert differing == {*case.model, *(["without"] if case.train else [])}, case.name
    assert len({config.out for _, _, config in runs}) == len(runs)
    objective = {name for case in ablation.CASES for name in case.train.get("without", [])}
    assert objective == set(PARTS)


def test_runs_and_table(tmp_path, capsys):
    out = str(tmp_path / "a")
    some = ["cases=[the whole,hebb,credit of the router]", "tasks=[recall,sort]", "seeds=[3,4]", f"out={out}"]
    assert ablation.main([*some, *QUICK]) == 0
    rows = json.loads((tmp_path / "a" / "ablation.json").read_text())
    assert [(row["removed"], row["task"], row["seeds"]) for row in rows] == [
        ("the whole", "sort", [3, 4]),
        ("the whole", "recall", [3, 4]),
        ("hebb", "recall", [3, 4]),
        ("credit of the router", "sort", [3, 4]),
    ]
    assert all(list(row["seq_acc"]) == ["id"] and len(row["seq_acc"]["id"]) == 2 for row in rows)
    lines = (tmp_path / "a" / "ablation.md").read_text().splitlines()
    assert [line.split("|")[1:4] for line in lines[6:]] == [
        [" sort ", " (nothing) ", " 2 "],
        [" sort ", " credit of the router ", " 2 "],
        [" recall ", " (nothing) ", " 2 "],
        [" recall ", " hebb ", " 2 "],
    ]
    assert ablation.main([*some, "seeds=[3]", *QUICK]) == 0  # nothing is missing


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("cases=[hebbb]", "cases must be names out of"),
        ("tasks=[mqar]", "tasks must be out of"),
        ("model=lstm", "model must be biohama or biohama_tiny"),
        ("jobs=0", "jobs must be an integer >= 1"),
        ("seed=3", "seed cannot be given to every run"),
        ("train.stepps=3", "stepps"),
    ],
)
def test_wrong_options_name_their_key(wrong, said, tmp_path, capsys):
    assert ablation.main([f"out={tmp_path}", wrong]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [ablation, suite, continual], ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "out must be given"), (["out=x", "options={a: 1}"], "options"), (["x"], "must be KEY=VALUE")],
)
def test_many_runs_name_what_is_wrong_with_a_command_line(module, arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert module.main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
