"""Target P6: what ``import bio_kernels`` costs on top of ``import torch``, and that a CPU path never imports Triton."""

from __future__ import annotations

import statistics
from typing import Any

from .memory import in_child

ROUNDS = 3


def test_import_time(benchmark, check_target) -> None:
    """In fresh interpreters: torch, then ours, then one operation on CPU tensors, forward and backward."""
    told: list[dict[str, Any]] = []
    in_child("benchmarks.child_import")  # so that all files are in the page cache
    benchmark.group = "import"
    benchmark.pedantic(lambda: told.append(in_child("benchmarks.child_import")), rounds=ROUNDS)
    median = {name: statistics.median(t[name] for t in told) for name in ("torch", "bio_kernels", "first_operation")}
    benchmark.extra_info.update({"op": "import", "seconds": median, "triton": told[0]["triton"]})
    what = f"import bio_kernels after torch ({median['torch']:.2f} s)"
    check_target("P6", what, median["bio_kernels"], 0.3, at_least=False, unit=" s")
    what = f"of (import, first operation on a CPU: {median['first_operation']:.2f} s) import Triton"
    check_target("P6", what, sum(told[0]["triton"]), 0, at_least=False, unit=" of 2")
