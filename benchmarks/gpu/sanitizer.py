"""compute-sanitizer over the smallest shapes: memcheck (out of bounds, misaligned) and racecheck (shared memory)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from .determinism import OPERATIONS
from .journal import LeftOut, Row
from .setting import ROOT, Rows, Setting

TOOLS = ("memcheck", "racecheck")
TIMEOUT_S = 240
FOUND = 86  # exit code of the checker where it found something


def environment() -> dict[str, str]:
    """Every tensor gets an allocation of its own, so that reading past its end is seen."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def watch(setting: Setting, tool: str, operation: str) -> Row:
    """AssertionError with the first findings; LeftOut where the checker is not there or cannot use this GPU."""
    checker = shutil.which("compute-sanitizer")
    if setting.cuda and checker is None:
        raise LeftOut("compute-sanitizer is not installed")
    command = [sys.executable, "-m", "benchmarks.gpu.smallest", operation, setting.device]
    if setting.cuda:
        command = [str(checker), "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *command]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise LeftOut(f"{tool} took more than {TIMEOUT_S} s") from None
    text = done.stdout + done.stderr
    if "Device not supported" in text or "not supported on" in text:
        raise LeftOut(f"{tool}: the GPU or its driver does not support it here")
    if "ran " not in text and done.returncode != FOUND:
        raise RuntimeError(f"ended with {done.returncode}: {text[-400:]}")
    kernels = sorted(set(re.findall(r"(_\w+_kernel)", text)))
    findings = [
        line.strip(" =") for line in text.splitlines() if re.search(r"Invalid|Race|hazard|Misaligned|Error:", line)
    ]
    assert done.returncode == 0, f"{tool} in {', '.join(kernels) or 'no kernel of ours'}: {'; '.join(findings[:4])}"
    return {"summary": [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]}


def rows(setting: Setting) -> Rows:
    for tool in TOOLS if setting.cuda else ("no checker",):
        for operation in setting.few(OPERATIONS):
            yield f"{tool} {operation}", lambda tool=tool, operation=operation: watch(setting, tool, operation)
