"""compute-sanitizer over small shapes: memcheck (out of bounds, misaligned) and racecheck (shared memory)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from .journal import LeftOut, Row
from .setting import Rows, Setting, child
from .smallest import SHAPES

# tool -> the last line of its report, whose first number counts what it found
SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
}
TIMEOUT_S = 240
FOUND = 86  # exit code of the checker where it found something
# torch asks the driver for functions that it may lack: errors of such calls are none of ours. Imports take long.
OPTIONS = ("--report-api-errors", "no", "--launch-timeout", "0", "--print-limit", "20", "--error-exitcode", str(FOUND))


def watch(setting: Setting, tool: str, operation: str, size: str) -> Row:
    """AssertionError with the first findings; LeftOut where the checker is not there or cannot use this GPU."""
    checker = shutil.which("compute-sanitizer")
    if setting.cuda and checker is None:
        raise LeftOut("compute-sanitizer is not installed")
    command = [sys.executable, "-m", "benchmarks.gpu.smallest", operation, setting.device, size]
    if setting.cuda:
        command = [str(checker), "--tool", tool, *OPTIONS, *command]
    try:
        # every tensor gets an allocation of its own, so that reading past its end is seen
        done = child(setting, command, TIMEOUT_S, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    except subprocess.TimeoutExpired:
        raise LeftOut(f"{tool} took more than {TIMEOUT_S} s") from None
    text = done.stdout + done.stderr
    summary = judge(tool, text) if setting.cuda else []
    if done.returncode != 0 or "ran " not in done.stdout:
        raise RuntimeError(f"ended with {done.returncode}: {text[-400:]}")
    return {"summary": summary}


def judge(tool: str, text: str) -> list[str]:
    """The checker's summary in what it and its target printed.

    AssertionError: it found something. RuntimeError: it did not watch. LeftOut: it cannot.
    """
    said = [line.strip("= ") for line in text.splitlines() if line.startswith("=====")]
    if any(re.search(r"not supported", line) for line in said):
        raise LeftOut(f"{tool}: the GPU or its driver does not support it here")
    counts = [int(found[1]) for line in said if (found := SUMMARIES[tool].match(line))]
    if not counts:
        raise RuntimeError(f"the checker did not attach: {text[-400:]}")
    kernels = sorted(set(re.findall(r"(_\w+_kernel)", "\n".join(said))))
    findings = [line for line in said if re.search(r"Invalid|Race|hazard|Misaligned|Error:", line)]
    where = ", ".join(kernels) or "no kernel of ours"
    assert not any(counts), f"{tool}: {sum(counts)} findings in {where}: {'; '.join(findings[:4])}"
    return [line for line in said if "SUMMARY" in line]


def rows(setting: Setting) -> Rows:
    for tool in SUMMARIES if setting.cuda else ("no checker",):
        for operation in setting.few(SHAPES["smallest"]):
            for size in SHAPES:
                yield (
                    f"{tool} {operation} {size}",
                    lambda tool=tool, operation=operation, size=size: watch(setting, tool, operation, size),
                )
