"""The test suite's own GPU cases, a file at a time, where pytest and hypothesis are there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .journal import LeftOut, Row
from .setting import Rows, Setting, child

FILES = (
    "attention", "topk_gather", "weighted_rows", "plasticity", "block_sparse", "properties", "determinism", "overflow",
    "compile", "transforms", "index", "shared_table", "errors", "sprout_backends",
)  # fmt: skip
TIMEOUT_S = 500
PROCESSES = 12  # that share the GPU, where pytest-xdist is there: most of a test is compiling
TEST_S = 90  # of a single test, where pytest-timeout is there


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def command(setting: Setting, name: str, report: Path) -> list[str]:
    """pytest on one file; with a GPU it writes report."""
    words = [sys.executable, "-m", "pytest", f"tests/test_{name}.py", "-q", "-p", "no:cacheprovider"]
    if not setting.cuda:
        return [*words, "--collect-only"]
    words += ["-m", "gpu", "--junitxml", str(report)]
    if installed("xdist"):
        words += ["-n", str(PROCESSES), "--dist", "load"]
    if installed("pytest_timeout"):
        words += ["--timeout", str(TEST_S)]
        # A wait for the GPU hears no signal. The other method ends the process, which xdist replaces.
        words += ["--timeout-method", "thread"] if installed("xdist") else []
    return words


def of_file(setting: Setting, name: str) -> Row:
    """AssertionError with the names of the tests that failed."""
    missing = [package for package in ("pytest", "hypothesis") if not installed(package)]
    if missing:
        raise LeftOut(f"{' and '.join(missing)} not installed")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        try:
            # cuBLAS refuses torch's deterministic mode, in which the tests run, without a workspace of fixed size
            done = child(setting, command(setting, name, report), TIMEOUT_S, CUBLAS_WORKSPACE_CONFIG=":4096:8")
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"test_{name}.py took more than {TIMEOUT_S} s") from None
        failed = failures(report) if report.exists() else None
    last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
    if not setting.cuda:
        assert done.returncode == 0, f"pytest ended with {done.returncode}: {last}"
        return {"summary": last}
    if done.returncode == 5:
        raise LeftOut("no test of the GPU in this file")
    if failed is None:
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-400:]}")
    assert not failed, f"{last}; " + "; ".join(failed[:12])
    assert done.returncode == 0, f"pytest ended with {done.returncode}: {last}"
    return {"summary": last}


def failures(report: Path) -> list[str]:
    """name: message, of every test that failed or could not be set up."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        for kind in ("failure", "error"):
            for failure in case.iter(kind):
                said = [line for line in (failure.get("message") or "").splitlines() if line.strip()]
                found.append(f"{case.get('name')}: {said[0][:120] if said else 'no message'}")
    return found


def rows(setting: Setting) -> Rows:
    for name in setting.few(FILES):
        yield name, lambda name=name: of_file(setting, name)
