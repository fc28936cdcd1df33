"""What this machine can do at best: bytes copied and floating-point operations a second, measured, not looked up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Roofline:
    """copy: bytes per second of a copy, read and write counted; matmul: FLOPs per second by dtype name."""

    copy: float
    matmul: dict[str, float]

    def least_seconds(self, bytes_moved: int, flops: int, dtype: torch.dtype) -> float:
        """The time that neither traffic nor arithmetic can beat."""
        return max(bytes_moved / self.copy, flops / self.matmul[str(dtype).removeprefix("torch.")])


WARM_UP_S = 0.3  # until a GPU has raised its clocks


def _median_seconds(job: Callable[[], Any], device: str, repeats: int = 5) -> float:
    taken, end = [], time.perf_counter() + (WARM_UP_S if device == "cuda" else 0.0)
    while time.perf_counter() < end:
        job()
        torch.cuda.synchronize()
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        job()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def _copy_seconds(size: int, device: str) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return _median_seconds(lambda: target.copy_(source), device)


@cache
def measured(device: str) -> Roofline:
    """The roofline with the number of threads now set; 256 MiB copied (2 GiB on a GPU), square matrices multiplied."""
    size, edge = (2**31, 8192) if device == "cuda" else (2**28, 1024)
    copy = 2 * size / _copy_seconds(size, device)
    matmul = {}
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        a = torch.randn(edge, edge, device=device, dtype=dtype)
        matmul[str(dtype).removeprefix("torch.")] = 2 * edge**3 / _median_seconds(lambda a=a: a @ a, device)
    return Roofline(copy, matmul)
