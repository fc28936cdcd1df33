"""Every kernel, compiled ahead of time for GPUs that are not here: the rules, the baseline, proof that they can fail.

The compiling runs in processes of its own (``python -m tests.aot``), without TRITON_INTERPRET, so that it stands in one
pytest session with the interpreter tests. By default sm_90 whole and one configuration a kernel for the others; the
rest is slow.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import aot_rules

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[1]
ARCHS = tuple(aot_rules.SHARED_LIMIT)
Report = dict[str, Any]


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    """compiled(*arguments, package=...) -> report of ``python -m tests.aot``; figures are kept in pytest's cache."""
    folder = tmp_path_factory.mktemp("aot")
    cache = getattr(pytestconfig, "cache", None)
    figures = (cache.mkdir("aot") if cache else folder) / "figures.json"
    done: dict[tuple[str, ...], Report] = {}

    def run(*arguments: str, package: Path = ROOT / "kernels") -> Report:
        key = (*arguments, str(package))
        if key not in done:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            environment["PYTHONPATH"] = os.pathsep.join([str(package), str(ROOT)])
            out = folder / f"report{len(done)}.json"
            command = [sys.executable, "-m", "tests.aot", "--json", str(out), "--cache", str(figures), *arguments]
            ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr[-4000:]
            done[key] = json.loads(out.read_text())
            print(f"{len(done[key]['rows'])} of {len(done[key]['shipped'])} configurations in {done[key]['seconds']} s")
        return done[key]

    return run


def _listed(problems: list[str]) -> None:
    assert not problems, f"{len(problems)} findings\n" + "\n".join(problems)


def _baseline_of_this_triton(report: Report) -> Report:
    baseline = aot_rules.read_baseline()
    if baseline["triton"] != report["triton"]:
        pytest.skip(f"absolute rules only: the baseline is of Triton {baseline['triton']}, here is {report['triton']}")
    return baseline


@pytest.mark.parametrize("arch", ARCHS)
def test_rules(compiled: Callable[..., Report], arch: str) -> None:
    _listed(aot_rules.violations(compiled("--default"), arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_no_worse_than_the_baseline(compiled: Callable[..., Report], arch: str) -> None:
    report = compiled("--default")
    _listed(aot_rules.regressions(report, _baseline_of_this_triton(report), arch))


def test_baseline_holds_exactly_what_ships(compiled: Callable[..., Report]) -> None:
    _listed(aot_rules.differences(compiled("--default")["shipped"], aot_rules.read_baseline()))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_configuration(compiled: Callable[..., Report], arch: str) -> None:
    report = compiled("--arch", arch)
    assert len(report["rows"]) == len(report["shipped"])
    _listed(aot_rules.violations(report) + aot_rules.regressions(report, _baseline_of_this_triton(report)))


@pytest.mark.parametrize(
    ("case", "arch", "finding"),
    [
        ("spilling", "sm_90", "spills"),
        ("spilling", "sm_100", "spills"),
        ("plain dot", "sm_80", "no tensor-core instruction"),
        ("plain dot", "sm_90", "no tensor-core instruction"),
        ("plain dot", "sm_100", "no tensor-core instruction"),
        *(("narrow product", arch, "wraps in 32 bits on the way to strength_ptr") for arch in ARCHS),
    ],
)
def test_a_wrong_kernel_is_caught(compiled: Callable[..., Report], case: str, arch: str, finding: str) -> None:
    found = aot_rules.violations(compiled("--controls"), arch)
    assert any(case in line and finding in line for line in found), found


_GOOD = {
    "config": "BLOCK=64", "registers": 100, "spill": 0, "shared": 1024, "tensor_memory": 0, "instructions": 1000,
    "tensor_core": 8, "kinds": "HGMMA", "load_bits": 128, "dots": 1, "narrow": [], "large": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "worse",
    [{"registers": 112}, {"instructions": 1102}, {"load_bits": 64}, {"spill": 4}, {"shared": 65537}, {"tensor_core": 0},
     {"kinds": "HMMA"},
     {"tensor_memory": 513}, {"error": "refused"}],
    ids=str,
)  # fmt: skip
def test_a_worse_figure_is_caught(worse: dict[str, Any]) -> None:
    name = "gfx942 | _kernel | case"
    baseline = {"triton": "1", "rows": {name: _GOOD}}
    report = {"triton": "1", "rows": {name: copy.deepcopy(_GOOD)}}
    assert aot_rules.violations(report) + aot_rules.regressions(report, baseline) == []
    report["rows"][name].update(worse)
    assert len(aot_rules.violations(report) + aot_rules.regressions(report, baseline)) == 1


def test_a_changed_set_of_configurations_is_caught() -> None:
    baseline = {"triton": "1", "rows": {"a": _GOOD, "b": _GOOD, "c": _GOOD}}
    found = aot_rules.differences({"a": "BLOCK=64", "b": "BLOCK=32", "d": "BLOCK=64"}, baseline)
    assert [line.split(":")[0] for line in found] == ["d", "c", "b"]


def test_without_its_cast_an_address_is_caught(compiled: Callable[..., Report], tmp_path: Path) -> None:
    """The strengths' offset pre * N is computed in 64 bits, and the check that says so sees it if it is not."""
    shutil.copytree(ROOT / "kernels" / "bio_kernels", tmp_path / "bio_kernels")
    source = tmp_path / "bio_kernels" / "_storage.py"
    narrowed = re.sub(r"^ +(pre|post) = \1\.to\(tl\.int64\)\n", "", source.read_text(), flags=re.MULTILINE)
    assert narrowed != source.read_text()
    source.write_text(narrowed)
    arguments = ("--addresses", "--arch", "sm_90")
    right, wrong = compiled(*arguments), compiled(*arguments, package=tmp_path)
    _listed([f"{name}: {row}" for name, row in right["rows"].items() if row.get("narrow", "error")])
    checked = {name for name, row in right["rows"].items() if " dense " in name and "values_ptr" in row["large"]}
    assert checked
    assert {name for name, row in wrong["rows"].items() if " dense " in name and row["narrow"]} == checked
