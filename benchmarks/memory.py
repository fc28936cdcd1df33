"""Peak memory of one call: what the allocator was asked for, or what the process came to occupy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]


def peak_bytes(job: Callable[[], Any], cuda: bool) -> int:
    """The most bytes of tensors that were alive at once during the call, beyond those alive before it.

    On a CPU torch's profiler reports every allocation of a tensor; a child process for each row, whose resident memory
    could be watched instead, would take seconds to start. Scratch memory of BLAS libraries is not seen.
    """
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = job()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = job()
    del result
    kineto: Any = watched.profiler  # the allocations in order are not public: events() sums them by operation
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def available_bytes() -> int:
    """Memory that a new process may take without swapping, 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def resident_peak(reset: bool = False) -> int:
    """Peak resident bytes of this process; with reset, from now on.

    Of VmHWM and not of getrusage, whose maximum a child inherits from the process that started it.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def can_watch_resident() -> bool:
    return os.access("/proc/self/clear_refs", os.W_OK)


def in_child(module: str, *args: str, threads: int = 1, timeout: float = 300.0) -> dict[str, Any]:
    """What ``python -m module args`` prints as JSON in its last line, from a fresh interpreter.

    Raises: RuntimeError with the end of what it wrote if it failed or took too long.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *args], env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"python -m {module} {' '.join(args)} took more than {timeout:.0f} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"python -m {module} {' '.join(args)} ended with {done.returncode}: {done.stderr[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])
