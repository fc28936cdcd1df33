"""Language models on a GPU at nanoGPT's budget for it: 5,000 steps of 64 windows of 256 characters.

nanoGPT publishes a validation loss of 1.4697 nats per character at this budget, on Tiny Shakespeare, which is not part
of this project: name its file by --data. The losses are those of the whole held-out text, windows of 256, with which
``python -m sprout.train`` ends. A call that runs out of time has the run save, and the next one goes on from there.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .journal import LeftOut, OutOfTime, Row
from .setting import Rows, Setting
from .supervision import ROOT, environment, new_mark
from .targets import entry, told

NEEDED = ("accelerate", "safetensors", "tqdm")
TARGET, PUBLISHED = 1.45, 1.4697
CLOSING_S = 45  # before the end of a call: what finishing a step and saving may take
BUDGET: dict[str, Any] = {"max_steps": 5000, "batch_size": 64, "window": 256, "eval_every": 500, "warmup_steps": 100}
COMMON: dict[str, Any] = {
    "tokenizer": "chars",
    "optimizer": "muon",
    "lr": 1e-3,
    "mixed_precision": "bf16",
    "dropout": 0.2,
}
WIDTH: dict[str, Any] = {"d_state": 384, "n_heads": 6}
POOL: dict[str, Any] = {
    "n_neurons": 1024,
    "initial_sparsity": 12,
    "final_sparsity": 16,
    "recruits_per_step": 2,
    "min_active": 4,
}
POOL |= {"n_interaction_steps": 3, "settling": 0.06, "conv_width": 4, "n_encoder_layers": 4}
RUNS: dict[str, dict[str, Any]] = {
    "SPROUT, 4 encoder layers and a pool": {**COMMON, **WIDTH, **POOL},
    "SPROUT, a pool alone": {**COMMON, **WIDTH, **POOL, "n_encoder_layers": 0},
    "GPT, 6 layers (control)": {**COMMON, **WIDTH, "model": "gpt", "n_encoder_layers": 6},
}
SMALLEST: dict[str, Any] = {
    "debug_mode": True,
    "max_steps": 2,
    "batch_size": 2,
    "window": 8,
    "n_neurons": 64,
    "d_state": 12,
}
SMALLEST |= {"device": "cpu", "mixed_precision": "no", "backend": "reference", "threads": 1}


def command(setting: Setting, name: str, out: Path) -> list[str]:
    """That starts the run in out, or goes on with it, also if it was cut on another machine."""
    options = {**RUNS[name], **(SMALLEST if setting.rehearsal else BUDGET), "seed": 0, "tensorboard": False}
    data = [] if setting.data is None else ["--data", str(setting.data)]
    if (out / "config.json").exists():
        return [sys.executable, "-m", "sprout.train", "--resume", str(out), "--force", *data]
    given = [text for key, value in options.items() for text in switch(key, value)]
    return [sys.executable, "-m", "sprout.train", *data, *given, "--out", str(out)]


def switch(key: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{key}"]
    return [f"--{key}", str(value)]


def trained(setting: Setting, name: str) -> Row:
    """The run's final figures. Raises: LeftOut, OutOfTime with the run saved, RuntimeError with its last words."""
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise LeftOut(f"{' and '.join(missing)} not installed")
    if setting.cuda and setting.data is None:
        raise LeftOut("name the text of Tiny Shakespeare: --data FILE --again")
    if setting.cuda and setting.end - time.monotonic() < 2 * CLOSING_S:
        raise OutOfTime
    out = setting.folder.resolve() / "language" / re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".log"), "ab") as log:
        child = subprocess.Popen(
            command(setting, name, out), cwd=ROOT, env=environment(new_mark()), stdout=log, stderr=log
        )
        try:
            code = finished(child, setting.end - CLOSING_S)
        finally:
            child.kill()  # if this process is told to end
    if code in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT):
        raise OutOfTime
    if code != 0:
        raise RuntimeError(f"ended with {code}: {out.with_suffix('.log').read_text(errors='replace')[-400:]}")
    final = json.loads((out / "final.json").read_text())
    loss = final["val"]["loss"]
    assert math.isfinite(loss), f"validation loss {loss}"
    row = {"loss": loss, "parameters": final["parameters"], "steps": final["steps"], "train_s": final["seconds"]}
    line = (
        f"validation loss {loss:.4f} nats per character ({PUBLISHED} published for nanoGPT), {final['seconds']:.0f} s"
    )
    return row | {"op": "language model", "line": line}


def finished(child: subprocess.Popen, end: float) -> int:
    """Its exit code; at end, on the clock time.monotonic(), it is told to save and stop."""
    try:
        return child.wait(None if math.isinf(end) else max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.terminate()
    try:
        return child.wait(CLOSING_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return 128 + signal.SIGTERM  # what it had saved before is there


def conclude(rows: dict[str, Row]) -> Row:
    """The best SPROUT against the target."""
    losses = {name: row["loss"] for name, row in rows.items() if name.startswith("SPROUT") and "loss" in row}
    if not losses:
        return told({"op": "language model"}, [])
    best = min(losses, key=losses.__getitem__)
    what = f"Tiny Shakespeare, 5,000 steps of 64 x 256 characters, {best}: validation loss"
    return told({"op": "language model"}, [entry("loss", what, losses[best], TARGET, at_least=False, unit=" nats")])


def rows(setting: Setting) -> Rows:
    for name in RUNS:
        yield name, lambda name=name: trained(setting, name)
