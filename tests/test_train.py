"""Training learns, says what it measured, and leaves a folder that can be used."""
# ruff: noqa: F401, F811 -- the fixture start

import json
import math

import pytest
import torch.nn.functional as F

from sprout import hub, text
from tests.training import final, metrics, start

GROUPS = ["--connection", "block_sparse", "--block_size", "16", "--blocks_per_row", "2", "--active_groups", "2"]


@pytest.mark.parametrize("model", ["sprout", "gpt", "encoder"])
def test_a_run_learns_and_leaves_everything(tmp_path, start, model):
    assert start("run", "--model", model, "--max_steps", "60", "--lr", "0.01", "--log_every", "10") == 0
    run = tmp_path / "run"
    steps = [record["step"] for record in metrics(run, "train")]
    assert steps == [10, 20, 30, 40, 50, 60]
    losses = [record["loss"] for record in metrics(run, "train")]
    assert 4.5 < losses[0] < 6.5
    assert losses[-1] < losses[0] - 1
    assert [record["step"] for record in metrics(run, "val")] == list(range(4, 61, 4))
    names = {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "model", "samples.txt", "final.json"}
    names |= {"tokenizer.json"}
    assert {path.name for path in run.iterdir()} == names
    summary = final(run)
    assert summary["steps"] == 60
    assert summary["tokens"] == 60 * 2 * 8
    assert summary["val"]["whole"]
    assert summary["best_val_loss"] <= min(record["loss"] for record in metrics(run, "val")[:-1])
    learnt, _ = hub.load(run)
    assert summary["parameters"] == sum(p.numel() for p in learnt.parameters())
    assert summary["parameters"] - summary["parameters_without_embeddings"] == (256 + 8) * 16


def test_the_final_loss_is_that_of_the_saved_model_on_every_token(tmp_path, start):
    assert start("run", "--max_steps", "5") == 0
    model, tokenizer = hub.load(tmp_path / "run")
    held_out = text.split((tmp_path / "text.txt").read_text())[1]
    tokens = tokenizer.encode(held_out)
    nats = 0.0
    for begin in range(0, len(tokens) - 1, 8):  # each token from those of its window, one window at a time
        window = tokens[begin : begin + 9]
        for place in range(1, len(window)):
            logits = model(window[:place].unsqueeze(0))
            nats += F.cross_entropy(logits, window[place : place + 1]).item()
    found = final(tmp_path / "run")["val"]
    assert found["targets"] == len(tokens) - 1
    assert found["loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))


def test_metrics_hold_what_was_promised(tmp_path, start):
    assert start("run") == 0
    record = metrics(tmp_path / "run", "train")[0]
    names = "loss lr grad_norm balance settling active_mean active_min active_max jaccard gate_change"
    assert set(record) == {*names.split(), "tokens_per_second", "seconds", "step", "kind"}
    assert 2 <= record["active_min"] <= record["active_mean"] <= record["active_max"] <= 10
    assert record["tokens_per_second"] > 0
    names = (
        "loss perplexity bits_per_character bits_per_byte targets balance settling active_mean active_min active_max"
    )
    record = metrics(tmp_path / "run", "val")[0]
    names += " jaccard gate_change used_share whole seconds step kind"
    assert set(record) == set(names.split())
    assert record["targets"] == 2 * 2 * 8
    assert 0 < record["used_share"] <= 1
    assert [r["whole"] for r in metrics(tmp_path / "run", "val")] == [False, False, True]


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "muon"],
        ["--mixed_precision", "bf16"],
        ["--grad_accumulation", "2"],
        ["--n_interaction_steps", "0"],
        ["--connection", "block_sparse", "--block_size", "16", "--blocks_per_row", "2"],
        [*GROUPS],
        [*GROUPS, "--optimizer", "muon", "--grad_accumulation", "2", "--plasticity", "0.1"],
        [*GROUPS, "--mixed_precision", "bf16", "--grad_clip", "0", "--freeze_strength"],
        ["--tokenizer", "chars"],
        ["--dropout", "0.1", "--grad_clip", "0", "--balance", "0", "--settling", "0"],
    ],
    ids=lambda options: "".join(options).replace("".join(GROUPS), "groups"),
)
def test_every_way_to_train(tmp_path, start, options):
    assert start("run", "--max_steps", "3", *options) == 0
    assert final(tmp_path / "run")["steps"] == 3
    assert all(p.isfinite().all() for p in hub.load(tmp_path / "run")[0].parameters())


def test_strengths_can_be_frozen_or_learn_by_hebb(tmp_path, start):
    strength = {}
    for name, options in {"free": [], "frozen": ["--freeze_strength"], "hebb": ["--plasticity", "0.5,oja"]}.items():
        assert start(name, "--max_steps", "3", *options) == 0
        strength[name] = hub.load(tmp_path / name)[0].pool.connection_strength
    assert not strength["frozen"].any()
    assert strength["free"].any()
    assert (strength["hebb"] > 0.1).any()
    assert strength["free"].max() < 0.1


def test_accumulated_batches_are_one_large_batch(tmp_path, start):
    """Four times one window draws the windows that one batch of four draws, and takes the mean of their gradients."""
    losses = {}
    for name, options in {
        "one": ["--batch_size", "4"],
        "four": ["--batch_size", "1", "--grad_accumulation", "4"],
    }.items():
        assert start(name, "--max_steps", "3", "--balance", "0", "--eval_every", "9", *options) == 0
        losses[name] = [record["loss"] for record in metrics(tmp_path / name, "train")]
    assert losses["four"] == pytest.approx(losses["one"], rel=1e-4)


def test_the_report_is_asked_for(tmp_path, start, monkeypatch):
    report = pytest.importorskip("sprout.analysis.report")
    asked = []
    monkeypatch.setattr(report, "write_report", lambda *arguments: asked.append(arguments) or arguments[-1])
    assert start("run", "--max_steps", "1", "--analyze_activation") == 0
    ((model, tokenizer, source, out),) = asked
    assert not model.training
    assert tokenizer.vocab_size == 256
    assert (tmp_path / "text.txt").read_text().endswith(source)
    assert out == tmp_path / "run" / "analysis"


def test_tensorboard_files_hold_the_metrics(tmp_path, start):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert start("run", "--max_steps", "4", "--eval_every", "2", "--tensorboard") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(record["step"], record["loss"]) for record in metrics(tmp_path / "run", "train")]
    assert [step for step, _ in shown] == [step for step, _ in expected]
    assert [value for _, value in shown] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert [event.step for event in events.Scalars("val/bits_per_character")] == [2, 4]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, start, capsys, monkeypatch):
    monkeypatch.setattr("sprout.trainer.schedule", lambda step, total, warmup_steps: math.inf if step == 5 else 1.0)
    assert start("run") == 1
    assert "the loss or a weight is not finite at step 6; lower --lr" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
    assert not (tmp_path / "run/lock").exists()


def test_the_default_folder_is_named_after_model_and_time(tmp_path, start, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start("x", "--out", "", "--model", "gpt", "--max_steps", "1") == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("gpt-")
    options = json.loads((made / "config.json").read_text())["options"]
    assert options["data"] == str(tmp_path / "text.txt")
