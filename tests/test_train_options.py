"""Options of a training run: where a value comes from, what is refused and how it is said."""

import json
import sys
from dataclasses import fields

import pytest
import torch

from sprout import SproutConfig, train
from sprout.train_config import (
    DEBUG,
    FREE_ON_RESUME,
    MODEL_DEFAULTS,
    OptionError,
    TrainConfig,
    continue_with,
    merge,
    model_names,
    parts,
    train_names,
)

FIXED = (
    "num_epochs batch_size n_neurons n_interaction_steps analyze_activation debug_mode data dataset tokenizer resume"
)
FIXED += (
    " seed out eval_every mixed_precision plasticity device max_steps window lr warmup_steps weight_decay grad_clip"
)
FIXED += (
    " balance settling optimizer d_state n_heads n_encoder_layers initial_sparsity final_sparsity recruits_per_step"
)
FIXED += " model freeze_strength config force grad_accumulation save_every threads log_every"


def refused(capsys, *arguments):
    """What the command line says, in one line, when it refuses."""
    assert train.main(arguments) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].startswith("sprout-train: error: ")
    return told[0].removeprefix("sprout-train: error: ")


def test_every_promised_flag_is_there():
    flags = {flag for action in train.parser()._actions for flag in action.option_strings}
    assert {f"--{name}" for name in FIXED.split()} <= flags


def test_help_is_given(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    assert "--n_neurons" in capsys.readouterr().out


def test_given_wins_over_file_over_debug_over_defaults():
    options = merge({"debug_mode": True, "batch_size": 7}, {"batch_size": 8, "window": 9})
    assert (options["batch_size"], options["window"]) == (7, 9)
    assert options["n_neurons"] == DEBUG["n_neurons"]
    assert options["lr"] == TrainConfig().lr
    assert merge({}, {})["d_state"] == MODEL_DEFAULTS["d_state"]
    assert merge({}, {"debug_mode": True})["max_steps"] == DEBUG["max_steps"]
    assert merge({}, {})["hysteresis"] == SproutConfig().hysteresis
    assert set(merge({}, {})) == {*train_names(), *model_names()}


def test_the_defaults_are_allowed():
    for given in ({}, {"debug_mode": True}):
        config, sizes = parts(merge(given, {}), vocab_size=256)
        assert sizes.max_seq_len == config.window
        assert sizes.causal


def test_types_on_the_command_line():
    arguments = "--lr 0.5 --max_steps 3 --data x --freeze_strength --no-tensorboard --n_neurons 9"
    _, given = train.parse(arguments.split())
    expected = {"lr": 0.5, "max_steps": 3, "data": "x", "freeze_strength": True, "tensorboard": False, "n_neurons": 9}
    assert given == expected


BAD = {
    "--model": "one of sprout, gpt, encoder, got 'x'",
    "--optimizer": "one of adamw, muon, got 'x'",
    "--mixed_precision": "one of no, bf16, fp16, got 'x'",
    "--device": "one of auto, cpu, cuda, got 'x'",
    "--plasticity": "RATE or RATE,oja with RATE > 0, got 'x'",
    "--tokenizer": "bytes, chars, bpe or bpe:SIZE, got 'x'",
    "--connection": "one of 'dense', 'block_sparse', got 'x'",
}
NUMBERS = {
    "num_epochs batch_size window grad_accumulation eval_every eval_batches log_every max_steps save_every threads": (
        ("0", "-1"),
        "an integer >= 1",
    ),
    "warmup_steps": (("-1",), "an integer >= 0"),
    "seed": (("-1", str(2**32)), r"an integer in 0..2**32-1"),
    "lr": (("0", "-1", "nan", "inf"), "a finite number > 0"),
    "weight_decay grad_clip balance settling": (("-1", "nan"), "a finite number >= 0"),
    "beta2": (("1", "-0.1"), "a number in 0..1, without 1"),
}


@pytest.mark.parametrize("flag", BAD)
def test_unknown_choices(capsys, flag):
    assert refused(capsys, flag, "x").startswith(f"{flag} must be {BAD[flag]}")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for names, (bad, allowed) in NUMBERS.items() for name in names.split() for value in bad],
)
def test_numbers_out_of_range(capsys, name, value, allowed):
    assert f"--{name} must be {allowed}, got " in refused(capsys, f"--{name}={value}")


@pytest.mark.parametrize("value", ["0", "-1", "1,hebb", "nan", ",oja"])
def test_malformed_plasticity(capsys, value):
    assert "--plasticity must be RATE or RATE,oja" in refused(capsys, f"--plasticity={value}")


def test_plasticity_is_a_rate_and_a_rule():
    assert TrainConfig(plasticity="0.5").hebb == (0.5, 0.0)
    assert TrainConfig(plasticity="1e-3,oja").hebb == (1e-3, 1.0)
    assert TrainConfig().hebb is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--n_neuron 5", "unknown argument --n_neuron; did you mean --n_neurons?"),
        ("--qqq 5", "unknown argument --qqq; see --help"),
        ("--max_steps x", "argument --max_steps: invalid int value: 'x'; see --help"),
        ("--n_neurons 32", "--final_sparsity must be an integer in 1..n_neurons=32, got 64; set --final_sparsity"),
        ("--d_state 30", "--d_state must be a multiple of n_heads=4, got 30; set --d_state"),
        ("--data a --dataset b", "--data and --dataset both name a text"),
        ("--model gpt --plasticity 1", "--plasticity needs --model sprout, got --model gpt"),
        ("--freeze_strength --plasticity 1", "--plasticity changes the strengths that --freeze_strength holds"),
        ("--mixed_precision fp16 --device cpu", "--mixed_precision fp16 needs a GPU; use bf16 or no"),
        ("--resume x --out y", "--out cannot be given with --resume"),
        ("--resume x --config y", "--config cannot be given with --resume"),
    ],
)
def test_other_refusals(capsys, arguments, message):
    assert refused(capsys, *arguments.split()).startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(capsys):
    assert refused(capsys, "--device", "cuda") == "--device cuda: torch finds no CUDA device; use --device cpu"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[1]", "must hold an object of options, got a list"),
        ('{"n_neuron": 5}', "has the unknown key 'n_neuron'; did you mean 'n_neurons'?"),
        ('{"out": "x"}', "has the unknown key 'out'"),
        ('{"lr": "fast"}', "--lr must be a finite number > 0, got 'fast'"),
        ('{"batch_size": 2.5}', "--batch_size must be an integer >= 1, got 2.5"),
        ('{"debug_mode": 1}', "--debug_mode must be true or false, got 1"),
        ('{"data": 1}', "--data must be text, got 1"),
    ],
)
def test_faulty_config_files(tmp_path, capsys, content, message):
    file = tmp_path / "options.json"
    if content is not None:
        file.write_text(content)
    assert message in refused(capsys, "--config", str(file))


def test_a_config_file_is_read(tmp_path, capsys):
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"n_neurons": 32}))
    assert "n_neurons=32" in refused(capsys, "--config", str(file))
    assert "n_neurons=33" in refused(capsys, "--config", str(file), "--n_neurons", "33")


def test_what_a_resumed_run_may_change():
    stored = merge({}, {})
    assert continue_with({"max_steps": 9, "num_epochs": 2}, stored)["max_steps"] == 9
    assert continue_with({"lr": stored["lr"]}, stored) == stored
    for name in set(stored) - set(FREE_ON_RESUME):
        with pytest.raises(OptionError, match=f"--{name} other cannot be changed on --resume: the run was made with"):
            continue_with({name: "other"}, stored)


@pytest.mark.parametrize(
    ("options", "tokens", "steps"),
    [
        (dict(max_steps=3), 10**9, 3),
        (dict(num_epochs=2, batch_size=4, window=5), 100, 10),
        (dict(num_epochs=1, batch_size=4, window=5), 101, 6),
        (dict(num_epochs=1, batch_size=4, window=5, grad_accumulation=2), 100, 3),
        (dict(num_epochs=3), 10, 3),
    ],
)
def test_an_epoch_draws_as_many_tokens_as_there_are(options, tokens, steps):
    assert TrainConfig(**options).total_steps(tokens) == steps
    assert TrainConfig(num_epochs=1, batch_size=4, window=5).total_steps(100, processes=5) == 1


def test_texts_that_cannot_be_used(tmp_path, capsys):
    file = tmp_path / "x.txt"
    file.write_text("only a few words")
    told = refused(capsys, "--data", str(file), "--out", str(tmp_path / "run"))
    assert told.startswith("the text is too short: 14 tokens to train on (--window 64 needs 65) and 2 to validate on")
    file.write_bytes(b"\0")
    assert "x.txt is binary" in refused(capsys, "--data", str(file), "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_existing_folder_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    told = refused(capsys, "--out", str(tmp_path), "--data", "/absent")
    assert "exists and is not empty (it is not a run's); name a new folder with --out" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize("name", ["accelerate", "safetensors", "psutil", "tqdm", "matplotlib"])
def test_missing_libraries_name_the_command(capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    told = refused(capsys, "--analyze_activation")
    assert told == f'training needs {name}: pip install "bio-kernels[train]"'


def test_every_option_says_what_it_is():
    for item in fields(TrainConfig):
        assert item.metadata["help"], item.name
