"""What options and machine decide about a run of the benchmarks, and what has been measured so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .peers import CompileBudget


@dataclass
class Session:
    """full: all shapes; short: few of them; strict: a missed target fails; device: "cpu" or "cuda"."""

    full: bool
    short: bool
    strict: bool
    threads: int
    device: str
    compiler: CompileBudget
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"
