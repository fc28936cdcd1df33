"""The test suite's own GPU cases, a file at a time, where pytest and hypothesis are there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from .journal import LeftOut, Row
from .setting import ROOT, Rows, Setting

FILES = (
    "attention", "topk_gather", "weighted_rows", "plasticity", "block_sparse", "properties", "determinism", "overflow",
    "compile", "transforms", "index", "shared_table", "errors", "sprout_backends",
)  # fmt: skip
TIMEOUT_S = 500


def of_file(setting: Setting, name: str) -> Row:
    """AssertionError with the names of the tests that failed."""
    missing = [package for package in ("pytest", "hypothesis") if importlib.util.find_spec(package) is None]
    if missing:
        raise LeftOut(f"{' and '.join(missing)} not installed")
    report = setting.folder / "tests" / f"{name}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", f"tests/test_{name}.py", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "gpu", "--junitxml", str(report.resolve())] if setting.cuda else ["--collect-only"]
    # cuBLAS refuses torch's deterministic mode, in which the tests run, without a workspace of fixed size
    env = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"test_{name}.py took more than {TIMEOUT_S} s") from None
    last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
    if not setting.cuda:
        assert done.returncode == 0, f"pytest ended with {done.returncode}: {last}"
        return {"summary": last}
    if done.returncode == 5:
        raise LeftOut("no test of the GPU in this file")
    if not report.exists():
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-400:]}")
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        for kind in ("failure", "error"):
            for found in case.iter(kind):
                failed.append(f"{case.get('name')}: {str(found.get('message')).splitlines()[0][:120]}")
    assert not failed, f"{last}; " + "; ".join(failed[:12])
    assert done.returncode == 0, f"pytest ended with {done.returncode}: {last}"
    return {"summary": last}


def rows(setting: Setting) -> Rows:
    for name in setting.few(FILES):
        yield name, lambda name=name: of_file(setting, name)
