"""Options, the session's settings, and the closing table."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from bio_kernels import backend_info

from . import roofline, table
from .case import Case
from .measure import WrongResult, measure
from .peers import CompileBudget
from .session import Session


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('the benchmarks need pytest-benchmark: pip install "bio-kernels[bench]"')
    group = parser.getgroup("bio-kernels benchmarks")
    group.addoption("--full", action="store_true", help="also B 256, K 256, pools up to 1,048,576")
    group.addoption("--short", action="store_true", help="B 32 and uniform indices only, nothing compiled, no P4")
    group.addoption("--strict-targets", action="store_true", help="a missed target fails, instead of being reported")
    group.addoption("--threads", type=int, default=1, help="CPU threads (1: on shared cores more of them contend)")
    group.addoption("--compile-budget", type=float, default=60.0, help="seconds for torch.compile, all together")


_SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    torch.set_num_threads(option.threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, for ours and for all peers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if option.full and option.short:
        raise pytest.UsageError("--full and --short exclude each other")
    budget = CompileBudget(float("inf") if option.full else 0.0 if option.short else option.compile_budget)
    chosen = {"full": option.full, "short": option.short, "strict": option.strict_targets}
    config.stash[_SESSION] = Session(**chosen, threads=option.threads, device=device, compiler=budget)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``spec`` takes the rows that the test's module lists for this machine."""
    if "spec" in metafunc.fixturenames:
        session = metafunc.config.stash[_SESSION]
        rows = vars(metafunc.module)["rows"]
        specs = rows(session.full, session.cuda)
        if session.short:
            specs = [spec for spec in specs if spec.batch == 32 and spec.distribution == "uniform"]
        metafunc.parametrize("spec", specs, ids=str)


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[_SESSION]


@pytest.fixture
def run(benchmark, session: Session):
    """Checks and measures a Case; its row joins the closing table."""

    def run(case: Case) -> dict[str, Any]:
        try:
            row = measure(benchmark, case, roofline.measured(session.device))
        except WrongResult as error:
            session.wrong.append(str(error))
            raise
        session.rows.append(row)
        return row

    return run


@pytest.fixture
def check_target(request: pytest.FixtureRequest, session: Session):
    """Compares a figure with what is to be reached.

    A missed target is reported in the closing table and does not fail the test: on a shared machine that would say more
    about its other users than about this library. ``--strict-targets`` makes it fail.
    """
    missed = []

    def check(name: str, what: str, measured: float, target: float, *, at_least: bool = True, unit: str = "x") -> None:
        reached = measured >= target if at_least else measured <= target
        entry = {"name": name, "what": what, "measured": measured, "target": target}
        entry |= {"at_least": at_least, "unit": unit, "reached": reached}
        session.targets.append(entry)
        request.getfixturevalue("benchmark").extra_info.setdefault("targets", []).append(entry)
        if not reached:
            missed.append(table.target_line(entry))

    yield check
    if missed and session.strict:
        pytest.fail("\n".join(missed))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    session = config.stash[_SESSION]
    for private in ("node", "release"):  # results are published: what kind of machine, not which one
        machine_info.pop(private, None)
    machine_info["backend"] = backend_info()
    machine_info["threads"] = session.threads
    machine_info["cores"] = os.cpu_count()
    cpu = machine_info.get("cpu", {}).get("brand_raw")
    machine_info["device"] = torch.cuda.get_device_name() if session.cuda else cpu
    measured = roofline.measured(session.device)
    machine_info["roofline"] = {"copy_bytes_per_s": measured.copy, "matmul_flops_per_s": measured.matmul}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    if not (session.rows or session.targets or session.wrong):
        return
    write = terminalreporter.write_line
    terminalreporter.section("bio-kernels: ours against the best peer")
    threads = f"{session.threads} thread" + ("s" if session.threads != 1 else "")
    write(f"device {session.device}, {threads}, torch {torch.__version__}; ratio = time of the best peer / ours")
    write("memory = peak of that peer / ours; roofline above 100%: data from a cache, or a noisy machine")
    for line in table.closing_lines(session.rows):
        write(line, red="LOSS" in line)
    for text in session.wrong:
        write(f"WRONG RESULT, not timed: {text}", red=True, bold=True)
    for entry in session.targets:
        write(table.target_line(entry), green=entry["reached"], red=not entry["reached"], bold=not entry["reached"])
    terminalreporter.section("peers that took no part")
    for line in table.not_run_lines(session.rows):
        write(line)
