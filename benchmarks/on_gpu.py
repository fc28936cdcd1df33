"""Checks and measures everything on a GPU, step by step, each in a few minutes.

    python -m benchmarks.on_gpu --list                       the steps, with an estimate of their minutes
    python -m benchmarks.on_gpu STEP [STEP ...] --out DIR    runs them; DIR/STEP.json is rewritten after every result
    python -m benchmarks.on_gpu all --out DIR --minutes 9    as much as fits; the same command again goes on from there
    python -m benchmarks.on_gpu collect --out DIR            benchmarks/results/<device>-<date>.json, for report.py

--rehearse runs the same code without a GPU, through Triton's interpreter on the smallest shapes; its figures say
nothing and are never collected. Exit code: 1 if a result was wrong, 0 otherwise, also where time ran out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # for a checkout that is not installed

RESTARTS = "BENCHMARKS_ON_GPU_RESTARTS"  # how often this call was begun anew, with a fresh context on the GPU
MOST_RESTARTS = 20


class Step(NamedTuple):
    """module.function(setting) yields the rows; checks: an error in a row is a wrong result too."""

    name: str
    minutes: float
    module: str
    function: str
    checks: bool
    what: str


STEPS = (
    Step("environment", 0.2, "machine", "rows", False, "names, versions, copy bandwidth, rate of matrix products"),
    Step("parity", 3, "parity", "rows", True, "every operation: outputs and gradients, dtypes, storages, sizes"),
    Step("tests", 8, "suite_of_tests", "rows", True, "the GPU cases of tests/, a file at a time"),
    Step("determinism", 2, "determinism", "rows", True, "the same bits 100 times, hot neurons (T12)"),
    Step("graphs", 4, "modes", "rows", True, "CUDA graphs, torch.compile, autocast"),
    Step("addressing", 1, "addressing", "rows", True, "matrices of more than 2**31 elements"),
    Step("sanitizer", 8, "sanitizer", "rows", True, "compute-sanitizer: memcheck and racecheck, smallest shapes"),
    Step("targets", 10, "targets", "rows", False, "T1 to T10 against all peers, in CUDA graphs"),
    Step("model", 12, "model", "rows", False, "SPROUT's and BioHama's steps against the naive model (T11)"),
    Step("million", 2, "model", "million_rows", False, "a training step of 1,048,576 neurons, peak memory (T7)"),
    Step("suite", 40, "races", "rows", False, "the benchmark suite, all shapes and all peers"),
    Step("tuning_select", 3, "constants", "select_rows", False, "bit search or radix select; chunks"),
    Step("tuning_scatter", 2, "sums", "scatter_rows", False, "row owner or atomics; hot neurons"),
    Step("tuning_heads", 2, "sums", "heads_rows", False, "heads a program of attention"),
    Step("tuning_blocks", 2, "sums", "blocks_rows", False, "size of a block of BlockSparse"),
    Step("tuning_constants", 6, "constants", "rows", False, "tiles and warps of the other kernels"),
    Step("tuning_tiles", 25, "tiles", "rows", False, "tile tables of attention, forward and backward"),
    Step("language", 25, "language", "rows", False, "SPROUT at nanoGPT's GPU budget, needs --data FILE"),
)
NAMED = {step.name: step for step in STEPS}


def listing() -> str:
    lines = [f"{step.name:17}{step.minutes:5.1f} min  {step.what}" for step in STEPS]
    return "\n".join([*lines, "minutes are estimates for an H200; what a call leaves, the next one does"])


def chosen(names: list[str], parser: argparse.ArgumentParser) -> list[Step]:
    unknown = [name for name in names if name not in NAMED and name != "all"]
    if unknown:
        parser.error(f"unknown step {', '.join(unknown)}; there are: {', '.join(NAMED)}, all, collect")
    return list(STEPS) if "all" in names else [NAMED[name] for name in names]


def run_step(step: Step, setting: Any, journal: Any) -> None:
    """The missing rows of one step. Raises: OutOfTime, DeviceLost."""
    module = importlib.import_module(f"{__package__}.gpu.{step.module}")
    conclude = getattr(module, "conclude", None)
    try:
        for key, job in getattr(module, step.function)(setting):
            journal.run(key, job)
        journal.complete = True
    finally:
        if conclude is not None:
            journal.conclude(conclude)
        journal.write()


def run(steps: list[Step], options: argparse.Namespace) -> int:
    from .gpu import closing
    from .gpu.journal import DeviceLost, Journal, OutOfTime
    from .gpu.setting import Setting

    end = time.monotonic() + 60 * options.minutes
    setting = Setting(options.rehearse, options.out, end, options.data and options.data.resolve())
    journals = [Journal(options.out, step.name, options.rehearse, end, options.again) for step in steps]
    lost = None
    for step, journal in zip(steps, journals, strict=True):
        if journal.complete:
            continue
        try:
            run_step(step, setting, journal)
        except OutOfTime:
            break
        except DeviceLost as error:
            lost = str(error)
            break
    restarts = int(os.environ.get(RESTARTS, "0"))
    if lost is not None and restarts < MOST_RESTARTS:  # nothing on the GPU works any more in this process
        left = max(0.0, end - time.monotonic()) / 60
        print(f"the GPU was lost to this process, which begins anew: {lost}", flush=True)
        os.environ[RESTARTS] = str(restarts + 1)
        names = [step.name for step in steps]
        again = [
            sys.executable,
            "-m",
            "benchmarks.on_gpu",
            *names,
            "--out",
            str(options.out),
            "--minutes",
            f"{left:.3f}",
            *([] if options.data is None else ["--data", str(options.data)]),
        ]
        os.execv(sys.executable, again)
    print("\n".join(["", *closing.lines(journals)]))
    return 1 if any(closing.wrong(j, s.checks) for s, j in zip(steps, journals, strict=True)) else 0


def prepare(rehearse: bool) -> None:
    """Settings that must stand before Triton is imported. Raises: SystemExit where the steps cannot run."""
    if rehearse:
        os.environ |= {"TRITON_INTERPRET": "1", "BIO_KERNELS_BACKEND": "triton"}
    import torch

    if importlib.util.find_spec("triton") is None:
        raise SystemExit("the kernels need Triton, which is not installed")
    if not rehearse and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --rehearse runs the same code without one")
    if rehearse and torch.cuda.is_available():
        raise SystemExit("--rehearse is for machines without a GPU")
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, for ours and for all peers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help="names of steps, all, or collect")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results of each step are kept")
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="begin no row after that long, and cut one of training runs"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="the text of the step language")
    parser.add_argument("--again", action="store_true", help="repeat rows that failed, broke or were left out")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on the smallest shapes")
    options = parser.parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    if not options.steps:
        parser.error("name a step, all, or collect; --list tells which there are")
    if options.out is None:
        parser.error("--out DIR is needed")
    if options.steps == ["collect"]:
        from .gpu import collect

        print(collect.write(options.out))
        return 0
    steps = chosen(options.steps, parser)
    prepare(options.rehearse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers and peers: the closing table should be the end of the output
        return run(steps, options)


if __name__ == "__main__":
    sys.exit(main())
