"""Experiments: runs that learn, stop, go on bitwise and are measured; what cannot be is refused by its name."""

import json
import os
import signal
from itertools import pairwise

import pytest
import torch

pytest.importorskip("hydra")
pytest.importorskip("torchmetrics")

from biohama.experiments import build, config, evaluate, train, trainer
from biohama.generation import free_run, teacher_forced
from biohama.metrics import seq_right
from sprout import checkpoint as ck
from sprout.runs import checkpoints, read_metrics
from tests.training import reset

SMALL = {"name": "gru", "width": 16}
TRAIN = {"steps": 12, "batch_size": 4, "warmup_steps": 2, "log_every": 5, "check_every": 4, "save_every": 4}
TRAIN["tensorboard"] = False
EVALUATION = {"sequences": 6, "batch_size": 4, "splits": ["train", "ood"]}
TINY = {"task": "copy", "model": SMALL, "train": TRAIN, "evaluation": EVALUATION, "device": "cpu"}


@pytest.fixture(autouse=True)
def _fresh():
    reset()
    yield
    reset()


def options(out, **more):
    return {**TINY, "out": str(out), **more}


def signal_at(monkeypatch, step, number=signal.SIGTERM):
    """A signal right after a step, once."""
    before = trainer.Trainer.train_step

    def stepped(self):
        facts = before(self)
        if self.step == step:
            monkeypatch.setattr(trainer.Trainer, "train_step", before)
            os.kill(os.getpid(), number)
        return facts

    monkeypatch.setattr(trainer.Trainer, "train_step", stepped)


def test_a_run_learns_and_leaves_everything(tmp_path):
    longer = {**TRAIN, "steps": 150, "batch_size": 16, "lr": 0.01, "log_every": 50, "check_every": 0}
    results = train.train_one(options(tmp_path / "run", train=longer))
    assert results == json.loads((tmp_path / "run/results.json").read_text())
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("config.json", "environment.json", "metrics.jsonl", "checkpoints", "results.json")
    }
    losses = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.2
    assert (results["task"], results["model"], results["seed"], results["steps"]) == ("copy", "gru", 0, 150)
    assert results["changes"] == {
        "model.width": 16,
        **{f"train.{k}": longer[k] for k in ("steps", "batch_size", "lr")},
    } | {"train.warmup_steps": 2}
    assert set(results["splits"]) == {"train", "ood"}
    _, _, model = build.load_run(tmp_path / "run")
    assert results["parameters"] == sum(p.numel() for p in model.parameters())


BIOHAMA = {"name": "biohama_tiny", "d_model": 16, "d_hidden": 16, "d_cue": 32}


@pytest.mark.parametrize(("model", "step"), [(SMALL, 4), (SMALL, 6), (SMALL, 12), (BIOHAMA, 6)])
def test_twelve_steps_are_some_and_the_rest(tmp_path, monkeypatch, model, step):
    whole = train.train_one(options(tmp_path / "whole", model=model))
    signal_at(monkeypatch, step)
    with pytest.raises(SystemExit) as ended:
        train.train_one(options(tmp_path / "parts", model=model))
    assert ended.value.code == 143
    assert checkpoints(tmp_path / "parts")[-1].name == f"step-{step:08d}"
    assert not (tmp_path / "parts/results.json").exists()
    parts = train.train_one(options(tmp_path / "parts", model=model), resume=True)
    timed = {"train_seconds": 0, "evaluation_seconds": 0}
    assert {**parts, **timed} == {**whole, **timed}
    found = [ck.read(checkpoints(tmp_path / name)[-1]) for name in ("whole", "parts")]
    flat = [ck.flatten([dict(sorted(f.weights.items())), {**f.state, "seconds": 0}]) for f in found]
    assert flat[0][1] == flat[1][1]
    assert flat[0][0].keys() == flat[1][0].keys()
    assert len(flat[0][0]) > 10
    for name, tensor in flat[0][0].items():
        assert torch.equal(tensor, flat[1][0][name]), name
    records = [
        [{k: v for k, v in r.items() if not k.startswith(("seconds", "steps_per"))} for r in read_metrics(tmp_path / n)]
        for n in ("whole", "parts")
    ]
    assert records[0] == records[1]
    assert [r["step"] for r in records[0]] == [4, 5, 8, 10, 12, 12]
    starts = json.loads((tmp_path / "parts/environment.json").read_text())
    assert [entry["step"] for entry in starts] == [0, step]


def test_a_signal_during_the_evaluation_leaves_it_to_the_resumed_run(tmp_path, monkeypatch):
    whole = train.train_one(options(tmp_path / "whole"))
    before = evaluate.free_run

    def interrupted(model, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return before(model, batch)

    monkeypatch.setattr(evaluate, "free_run", interrupted)
    with pytest.raises(SystemExit) as ended:
        train.train_one(options(tmp_path / "parts"))
    assert ended.value.code == 130
    monkeypatch.undo()
    parts = train.train_one(options(tmp_path / "parts"), resume=True)
    assert parts["splits"] == whole["splits"]
    assert len(read_metrics(tmp_path / "parts")) == len(read_metrics(tmp_path / "whole"))


def test_a_finished_run_is_only_read_and_no_other_run_goes_on_in_its_folder(tmp_path, monkeypatch):
    first = train.train_one(options(tmp_path / "run"))
    assert train.train_one(options(tmp_path / "run"), resume=True) == first
    with pytest.raises(config.OptionError, match=r"train\.lr cannot be changed from 0\.0015 to 0\.1"):
        train.train_one(options(tmp_path / "run", train={**TRAIN, "lr": 0.1}), resume=True)
    with pytest.raises(config.OptionError, match=r"is not empty .continue it with resume="):
        train.train_one(options(tmp_path / "run"))
    again = train.train_one(options(tmp_path / "run", evaluation={"sequences": 3, "splits": ["id"]}), resume=True)
    assert {name: split["sequences"] for name, split in again["splits"].items()} == {"id": 3}


def test_a_run_ends_when_it_is_good_enough_and_a_next_one_starts_from_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "check", lambda self: self.step / 10)
    signal_at(monkeypatch, 8)
    with pytest.raises(SystemExit):
        train.train_one(options(tmp_path / "run", train={**TRAIN, "stop_at": 0.8}))
    assert not ck.read(checkpoints(tmp_path / "run")[-1]).state["done"]
    for _ in range(2):
        results = train.train_one(options(tmp_path / "run", train={**TRAIN, "stop_at": 0.8}), resume=True)
        assert results["steps"] == 8
    assert ck.read(checkpoints(tmp_path / "run")[-1]).state["done"]
    weights = build.newest_weights(tmp_path / "run")
    made = config.make_config(options(tmp_path / "next", init=str(tmp_path / "run"), seed=3))
    started = trainer.Trainer(made, build.build_task(made.task), train.make_accelerator(made))
    for name, tensor in started.model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    made.model.width = 32
    with pytest.raises(train.RunError, match="are not this model's"):
        trainer.Trainer(made, build.build_task(made.task), train.make_accelerator(made))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(train.RunError, match=r"not finite before step 5; lower train\.lr"):
        train.train_one(
            options(tmp_path / "run", train={**TRAIN, "lr": 1e38, "clip": 0.0, "check_every": 0, "save_every": 100})
        )


def test_the_learning_rate_rises_is_held_and_falls_to_a_twentieth():
    shares = [trainer.schedule(step, 200, 10) for step in range(200)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9:141] == [1.0] * 132
    assert shares[170] == pytest.approx(0.5)
    assert shares[199] == pytest.approx(0.05, abs=1e-3)
    assert all(a >= b for a, b in pairwise(shares[10:]))
    long = [trainer.schedule(step, 100, 90) for step in range(100)]
    assert max(long) == long[74] == pytest.approx(75 / 90), "a long warm-up meets the end, it does not fall off it"
    assert max(abs(a - b) for a, b in pairwise(long)) < 0.05
    assert trainer.schedule(0, 100, 0) == 1.0


def test_measuring_is_the_same_in_any_batches_and_the_same_sequences_for_every_model():
    task = build.build_task(config.TaskOptions("copy"))
    torch.manual_seed(0)
    model = build.build_model(config.MODELS["gru"], task.vocab_size)
    made = [
        evaluate.evaluate(model, task, config.EvaluationOptions(sequences=7, batch_size=b, splits=["id", "hard"]))
        for b in (3, 100)
    ]
    for split in ("id", "hard"):
        a, b = made[0][split], made[1][split]
        assert a.pop("perplexity") == pytest.approx(b.pop("perplexity"), rel=1e-5)
        assert a == b
        assert sum(row[1] for row in a["by_length"]) == 7
    batch = task.sample("hard", 7, evaluate.split_generator(config.EvaluationOptions().seed, "hard"))
    told = model(batch.tokens)
    right = (told.argmax(-1) == batch.targets)[batch.scored()].double().mean().item()
    assert made[0]["hard"]["token_acc"] == pytest.approx(right)
    lengths = sorted(batch.scored().sum(1).tolist())
    assert [length for length, n, _ in made[0]["hard"]["by_length"] for _ in range(n)] == lengths
    assert evaluate.evaluate(model, task, config.EvaluationOptions(), lambda: True) is None


PARROT = """
import torch
from biohama.tasks import Batch

class Parrot:
    name, vocab_size, splits = "parrot", 5, ("train", "long")

    def __init__(self, length=3):
        self.length = length

    def sample(self, split, n, generator):
        tokens = torch.randint(1, 5, (n, self.length * (1 + (split == "long"))), generator=generator)
        return Batch(tokens, tokens.clone(), torch.ones_like(tokens, dtype=torch.bool))

    def describe(self, tokens):
        return [str(int(token)) for token in tokens]
"""


def test_a_task_of_ones_own_is_learnt(tmp_path, monkeypatch):
    """To say again what one hears is easy: the figures are those of generation and metrics, not those of chance."""
    (tmp_path / "birds.py").write_text(PARROT)
    monkeypatch.syspath_prepend(tmp_path)
    longer = {**TRAIN, "steps": 60, "batch_size": 32, "lr": 0.02}
    request = {"task": "birds:Parrot", "train": longer, "evaluation": {"sequences": 40, "free_running": 15}}
    results = train.train_one(options(tmp_path / "run", **request))
    assert results["task"] == "birds.Parrot"
    assert results["splits"]["train"]["seq_acc"] > 0.9
    assert read_metrics(tmp_path / "run")[-1]["seq_acc"] > 0.9
    _, task, model = build.load_run(tmp_path / "run")
    batch = task.sample("long", 40, evaluate.split_generator(config.EvaluationOptions().seed, "long"))
    found = results["splits"]["long"]
    told = seq_right(teacher_forced(model, batch), batch)
    alone = seq_right(free_run(model, batch), batch)[:15]
    assert found["seq_acc_teacher_forced"] == pytest.approx(told.double().mean().item())
    assert (found["seq_acc"], found["free_running_sequences"]) == (pytest.approx(alone.double().mean().item()), 15)
    assert found["by_length"] == [[6, 15, int(alone.sum())]]
    none = evaluate.evaluate(model, task, config.EvaluationOptions(sequences=40, free_running=0, splits=["long"]))
    assert none["long"]["seq_acc"] is None
    assert none["long"]["by_length"] == [[6, 40, int(told.sum())]]


WRONG = {
    "train.steps must be an integer >= 1, got 0": {"train": {"steps": 0}},
    "train.lr must be a finite number > 0, got nan": {"train": {"lr": float("nan")}},
    "train.clip must be a finite number >= 0": {"train": {"clip": -1.0}},
    "train.stop_at must be a number in 0..1": {"train": {"stop_at": 1.5, "check_every": 1}},
    "train.check_every must be >= 1 where train.stop_at is given": {"train": {"stop_at": 0.5}},
    "train.batch_size": {"train": {"batch_size": "many"}},
    "train.stepz": {"train": {"stepz": 3}},
    "evaluation.sequences must be an integer >= 1": {"evaluation": {"sequences": 0}},
    "evaluation.free_running must be an integer in 0..evaluation.sequences=200": {"evaluation": {"free_running": 201}},
    "seed must be an integer in 0..2\\*\\*32-1, got -1": {"seed": -1},
    "threads must be an integer >= 1": {"threads": 0},
    "device must be one of auto, cpu, cuda, got 'tpu'": {"device": "tpu"},
    "model must be one of .*, got 'lstmm'; did you mean lstm": {"model": "lstmm"},
    "model.d_nod": {"model": {"name": "biohama", "d_nod": 3}},
    "model.d_node": {"model": {"name": "biohama", "d_node": 2.5}},
    "'sede' not in 'Config' .sede": {"sede": 1},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_asked_for_is_refused_by_its_key(message):
    with pytest.raises(config.OptionError, match=message):
        config.make_config(WRONG[message])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"model": {"name": "lstm", "width": -1}}, r"model\.width must be an integer >= 0, got -1"),
        ({"model": {"name": "biohama", "modules": ["fly"]}}, r"model\.modules must be .*'fly'"),
        ({"task": {"name": "mqar", "options": {"vocab": 3}}}, "task: options of 'mqar': .*'vocab'"),
        ({"task": {"name": "mqar", "options": {"vocab_size": 3}}}, "task: vocab_size must be an integer >= 4, got 3"),
        ({"task": "nowhere:Task"}, "task: name 'nowhere:Task': the module 'nowhere' cannot be imported"),
        ({"evaluation": {"splits": ["easy"]}}, r"evaluation\.splits must be out of train, id, ood.*, got 'easy'"),
    ],
)
def test_what_only_task_or_model_know_is_refused_before_a_folder_is_made(tmp_path, request_, message):
    with pytest.raises(config.OptionError, match=message):
        train.train_one(options(tmp_path / "run", **request_))
    assert not (tmp_path / "run").exists()


def test_names_tell_runs_apart():
    names = [
        config.run_name(config.make_config(request))
        for request in (
            {"seed": 1},
            {"task": "all_four", "model": "lstm"},
            {"task": {"name": "copy"}, "train": {"lr": 0.01}, "threads": 1},
            {
                "task": {"name": "mqar", "options": {"vocab_size": 64}},
                "model": {"name": "biohama_tiny", "threshold": 0.0},
            },
        )
    ]
    assert names == [
        "copy-biohama-s1",
        "all_four-lstm-s0",
        "copy-biohama-s0-train.lr=0.01",
        "mqar-biohama_tiny-s0-task.options.vocab_size=64-model.threshold=0.0",
    ]
