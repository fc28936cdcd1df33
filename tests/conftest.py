"""What every test stands on: Triton's interpreter where there is no GPU, and uninitialised memory full of NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Before anything imports triton: the interpreter is chosen when a kernel is decorated.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import ways

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "default_memory: torch's default mode, memory as the allocator leaves it")
    config.addinivalue_line("markers", "pages(bytes): memory that a test of large addresses may commit")


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In torch's deterministic mode torch.empty holds NaN (integers: the largest value), so what reads it shows."""
    poisoned = request.node.get_closest_marker("default_memory") is None
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(poisoned)
    torch.utils.deterministic.fill_uninitialized_memory = poisoned
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of our switches set, whatever the shell that started pytest holds."""
    monkeypatch.delenv("BIO_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("BIO_KERNELS_CHECK", raising=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With -v: the worst error met, against the float64 dense baseline, of each operation, dtype and backend."""
    if config.option.verbose < 1 or not ways.WORST:
        return
    terminalreporter.section("worst errors (largest difference / largest value of the float64 dense baseline)")
    for key in sorted(ways.WORST):
        forward, gradient = ways.WORST[key]
        terminalreporter.write_line(f"{' '.join(key):52} forward {forward:.1e}   gradient {gradient:.1e}")
