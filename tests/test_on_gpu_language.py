"""The language models of a GPU session, rehearsed: a run that is cut goes on, one that fails says why."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import on_gpu
from benchmarks.gpu import journal, language
from benchmarks.gpu.setting import Setting
from sprout.train import parse
from sprout.train_config import merge, parts

RUNS = language.RUNS  # before they are replaced
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")


@pytest.fixture(autouse=True)
def rehearsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rehearsal sets is taken back."""
    for name in ("TRITON_INTERPRET", "BIO_KERNELS_BACKEND"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(language, "RUNS", {"SPROUT": {}})


def rehearse(out: Path, *more: str) -> dict[str, Any]:
    """What the file of the step holds after a call that nothing was wrong in."""
    assert on_gpu.main(["language", "--out", str(out), "--rehearse", *more], supervised=False) == 0
    return json.loads((out / "language.json").read_text())


CUT_ONCE = """
import json, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[1])
if not out.exists():
    out.mkdir()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (out / "ready").touch()
    time.sleep(60)
figures = {"val": {"loss": 1.25}, "parameters": 7, "steps": 3, "seconds": 2.0}
(out / "final.json").write_text(json.dumps(figures))
"""


def test_a_training_run_that_is_cut_goes_on_and_is_no_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "CLOSING_S", 10)
    monkeypatch.setattr(language, "command", lambda setting, name, out: [sys.executable, "-c", CUT_ONCE, str(out)])
    out = tmp_path / "language" / "sprout"
    for _ in range(journal.ATTEMPTS + 1):
        shutil.rmtree(out, ignore_errors=True)
        found = rehearse(tmp_path, "--minutes", "0.2")
        assert (out / "ready").exists()
        assert not found["complete"]
        assert found["rows"]["SPROUT"] == {"status": "running", "attempts": 0}
    row = rehearse(tmp_path)["rows"]["SPROUT"]
    assert row | {"status": "ok", "loss": 1.25, "parameters": 7, "steps": 3} == row


def test_a_training_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no such text')"])
    row = rehearse(tmp_path)["rows"]["SPROUT"]
    assert row["status"] == "error"
    assert "ended with 1: no such text" in row["message"]


def test_the_target_is_that_of_the_best_sprout() -> None:
    losses = {"SPROUT, a": 1.5, "SPROUT, b": 1.44, "GPT (control)": 1.3}
    (target,) = language.conclude({name: {"loss": loss} for name, loss in losses.items()})["targets"]
    assert (target["measured"], target["reached"]) == (1.44, True)
    assert "SPROUT, b" in target["what"]
    assert language.conclude({"GPT (control)": {"loss": 1.3}})["targets"] == []


def test_sprout_train_knows_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "RUNS", RUNS)
    text = tmp_path / "text.txt"
    for rehearsal in (True, False):
        setting = Setting(rehearsal, tmp_path, data=text)
        for name in RUNS:
            _, options = parse(language.command(setting, name, tmp_path / "run")[3:])
            assert options["data"] == str(text)
            assert options.get("n_encoder_layers") == RUNS[name]["n_encoder_layers"], "rehearsed as it is run"
            parts(merge(options, {}), vocab_size=65)
    (tmp_path / "config.json").touch()
    rest, options = parse(language.command(setting, name, tmp_path)[3:])
    assert (rest.resume, rest.force, options) == (str(tmp_path), True, {"data": str(text)})
