"""Where the steps run: a GPU, or, in a rehearsal, a CPU that interprets the same kernels on the smallest shapes."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..peers import CompileBudget
from ..session import Session
from .journal import OutOfTime, Row
from .supervision import ROOT, end_marked, environment, new_mark

Rows = Iterator[tuple[str, Callable[[], Row]]]  # of a step: the key of each row, and what computes it


@dataclass(frozen=True)
class Setting:
    """rehearsal: no GPU, Triton's interpreter, and figures that say nothing. folder: where steps may leave files.

    end: on the clock time.monotonic(), when this call should be over. data: a text, or None.
    """

    rehearsal: bool
    folder: Path
    end: float = math.inf
    data: Path | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def cuda(self) -> bool:
        return not self.rehearsal

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The interpreter's products of bfloat16 are wrong, and it is slow."""
        return (torch.float32,) if self.rehearsal else (torch.float32, torch.float16, torch.bfloat16)

    def few(self, items: Iterable[Any], number: int = 1) -> list[Any]:
        """All of them, or the first few in a rehearsal."""
        return list(items)[:number] if self.rehearsal else list(items)

    def session(self) -> Session:
        """All peers, and all the time for compilers; in a rehearsal nothing is compiled."""
        budget = CompileBudget(0.0 if self.rehearsal else float("inf"))
        return Session(True, self.rehearsal, False, torch.get_num_threads(), self.device, budget)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit; NaN equals NaN of the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integers), b.detach().contiguous().view(integers))


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it torch.empty holds NaN (integers: the largest value), so that what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = fill


def child(setting: Setting, command: list[str], limit: float, **more: str) -> subprocess.CompletedProcess[str]:
    """What command did in the checkout, more added to its environment, in at most limit seconds.

    It is killed, with all it has started, after that and at the end of this call (of which it gets at least a second).
    Raises: subprocess.TimeoutExpired after limit; OutOfTime at the end of this call.
    """
    allowed = max(1.0, min(limit, setting.end - time.monotonic()))
    mark = new_mark()
    try:
        return subprocess.run(
            command, cwd=ROOT, env=environment(mark, **more), capture_output=True, timeout=allowed, check=False,
            encoding="utf8", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        if allowed < limit:
            raise OutOfTime from None
        raise
    finally:
        end_marked(mark)


def commit() -> dict[str, Any]:
    """id and dirty of the checkout, as report.py reads them.

    Where git or its folder is missing: the id that BENCHMARKS_COMMIT holds, or {}.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    told = os.environ.get("BENCHMARKS_COMMIT")
    if not (ROOT / ".git").exists():  # git would find the one of a folder above
        return {"id": told} if told else {}
    try:
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"id": told} if told else {}


def python_version() -> str:
    return platform.python_version()
