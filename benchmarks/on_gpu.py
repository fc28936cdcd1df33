"""Checks and measures everything on a GPU, step by step, each in a few minutes.

    python -m benchmarks.on_gpu --list                       the steps, with an estimate of their minutes
    python -m benchmarks.on_gpu STEP [STEP ...] --out DIR    runs them; DIR/STEP.json is rewritten after every result
    python -m benchmarks.on_gpu all --out DIR --minutes 9    as much as fits; the same command again goes on from there
    python -m benchmarks.on_gpu collect --out DIR            benchmarks/results/<device>-<date>.json, for report.py

The steps run in a process of their own; where it is lost (the GPU does not answer, a row takes longer than its limit,
a crash) another one goes on. Several calls of different steps may share DIR and the GPU, if only checks are among them.
In a copy without git's folder the environment variable BENCHMARKS_COMMIT says which commit it is.
--rehearse runs the same code without a GPU, through Triton's interpreter on the smallest shapes; its figures say
nothing and are never collected. Exit code: 1 if a result was wrong, 0 otherwise, also where time ran out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from .gpu import supervision

sys.path.append(str(supervision.ROOT / "kernels"))  # for a checkout that is not installed
WORKER = (sys.executable, "-m", "benchmarks.on_gpu")


class Step(NamedTuple):
    """module.function(setting) yields the rows; limit: seconds of a row; checks: an error in a row is wrong too."""

    name: str
    minutes: float
    limit: float
    module: str
    function: str
    checks: bool
    what: str


STEPS = (
    Step("environment", 0.2, 120, "machine", "rows", False, "names, versions, copy bandwidth, rate of matrix products"),
    Step("parity_topk", 4, 120, "parity", "topk_rows", True, "topk_gather: outputs and gradients, dtypes, sizes"),
    Step("parity_attention", 4, 120, "parity", "attention_rows", True, "sparse_attention, likewise, and storages"),
    Step("parity_rows", 4, 120, "parity", "weighted_rows_rows", True, "weighted_rows, likewise"),
    Step("parity_update", 4, 120, "parity", "update_rows", True, "update_strength_, likewise"),
    Step("tests", 6, 540, "suite_of_tests", "rows", True, "the GPU cases of tests/, a file at a time"),
    Step("determinism", 4, 120, "determinism", "rows", True, "the same bits 100 times, hot neurons (T12)"),
    Step("graphs", 4, 120, "modes", "rows", True, "CUDA graphs, torch.compile, autocast"),
    Step("addressing", 1, 120, "addressing", "rows", True, "matrices of more than 2**31 elements"),
    Step("sanitizer", 10, 300, "sanitizer", "rows", True, "compute-sanitizer: memcheck and racecheck, small shapes"),
    Step("targets", 10, 300, "targets", "rows", False, "T1 to T10 against all peers, in CUDA graphs"),
    Step("model", 12, 300, "model", "rows", False, "SPROUT's and BioHama's steps against the naive model (T11)"),
    Step("million", 2, 300, "model", "million_rows", False, "a step of 1,048,576 neurons, peak memory (T7)"),
    Step("suite", 40, 300, "races", "rows", False, "the benchmark suite, all shapes and all peers"),
    Step("tuning_select", 3, 120, "constants", "select_rows", False, "bit search or radix select; chunks"),
    Step("tuning_scatter", 2, 120, "sums", "scatter_rows", False, "row owner or atomics; hot neurons"),
    Step("tuning_heads", 2, 120, "sums", "heads_rows", False, "heads a program of attention"),
    Step("tuning_blocks", 2, 120, "sums", "blocks_rows", False, "size of a block of BlockSparse"),
    Step("tuning_constants", 6, 120, "constants", "rows", False, "tiles and warps of the other kernels"),
    Step("tuning_tiles", 25, 120, "tiles", "rows", False, "tile tables of attention, forward and backward"),
    Step("language", 25, math.inf, "language", "rows", False, "SPROUT at nanoGPT's GPU budget, needs --data FILE"),
)
NAMED = {step.name: step for step in STEPS}
GROUPS = {"parity": [name for name in NAMED if name.startswith("parity_")], "all": list(NAMED)}


def listing() -> str:
    lines = [f"{step.name:17}{step.minutes:5.1f} min  {step.what}" for step in STEPS]
    lines += [f"{'parity':17}           stands for {', '.join(GROUPS['parity'])}"]
    return "\n".join([*lines, "minutes are estimates for an H200; what a call leaves, the next one does"])


def chosen(names: list[str], parser: argparse.ArgumentParser) -> list[Step]:
    unknown = [name for name in names if name not in NAMED and name not in GROUPS]
    if unknown:
        parser.error(f"unknown step {', '.join(unknown)}; there are: {', '.join([*NAMED, *GROUPS])}, collect")
    return [NAMED[name] for name in dict.fromkeys(found for name in names for found in GROUPS.get(name, [name]))]


# -------------------------------------------------------------------------------- the process that works


def run_step(step: Step, setting: Any, journal: Any) -> None:
    """The missing rows of one step. Raises: OutOfTime, DeviceLost."""
    conclude = None
    try:
        with journal.whole():
            module = importlib.import_module(f"{__package__}.gpu.{step.module}")
            conclude = getattr(module, "conclude", None)
            for key, job in getattr(module, step.function)(setting):
                journal.run(key, job)
    finally:
        if conclude is not None:
            journal.conclude(conclude)
        journal.write()


def work(steps: list[Step], options: argparse.Namespace, end: float, limits: bool) -> int:
    """Runs the steps: 0, or ANEW if the GPU is lost to this process. limits: a row that takes too long ends it."""
    from .gpu.journal import DeviceLost, Journal, OutOfTime
    from .gpu.setting import Setting

    setting = Setting(options.rehearse, options.out, end, options.data and options.data.resolve())
    journals = [
        Journal(options.out, step.name, options.rehearse, end, options.again, step.limit if limits else math.inf)
        for step in steps
    ]
    for journal in journals:
        if options.again and journal.path.exists():  # also of a step that another process will come to
            journal.write()
    for step, journal in zip(steps, journals, strict=True):
        if journal.complete:
            continue
        try:
            run_step(step, setting, journal)
        except OutOfTime:
            break
        except DeviceLost as error:
            print(f"the GPU was lost to this process: {error}", flush=True)
            return supervision.ANEW
    return 0


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


def prepared(steps: list[Step], options: argparse.Namespace, end: float, limits: bool) -> int:
    prepare(options.rehearse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers and peers: the closing table should be the end of the output
        return work(steps, options, end, limits)


def worker(steps: list[Step], options: argparse.Namespace, end: float) -> int:
    """The exit code of a process that a supervisor has started."""
    supervision.obey()
    try:
        return prepared(steps, options, end, limits=True)
    except SystemExit as left:
        if isinstance(left.code, int):
            return left.code
        print(left.code, file=sys.stderr)
        return supervision.REFUSED


# -------------------------------------------------------------------------------- the process that is called


def command(steps: list[Step], options: argparse.Namespace, end: float, number: int) -> list[str]:
    """Of worker number, with the minutes that are left; only the first one drops what was not ok."""
    names = [step.name for step in steps]
    left = max(0.0, end - time.monotonic()) / 60 if options.minutes > 0 else options.minutes
    given = [*WORKER, *names, "--worker", "--out", str(options.out), "--minutes", f"{left:.4f}"]
    given += [] if options.data is None else ["--data", str(options.data)]
    given += ["--again"] if options.again and number == 0 else []
    return given + (["--rehearse"] if options.rehearse else [])


def closing_lines(steps: list[Step], options: argparse.Namespace) -> int:
    """Prints what the files hold; 1 if something in them is wrong, otherwise 0."""
    from .gpu import closing
    from .gpu.journal import Journal

    journals = [Journal(options.out, step.name, options.rehearse) for step in steps]
    print("\n".join(["", *closing.lines(journals)]), flush=True)
    return int(any(closing.wrong(j, s.checks) for s, j in zip(steps, journals, strict=True)))


def parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, list[Step]]:
    """The options, and the steps that they name (none for --list and collect)."""
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
    parser.add_argument("--again", action="store_true", help="repeat rows that failed, broke, were cut or left out")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on the smallest shapes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # another process waits for this one
    options = parser.parse_args(arguments)
    if options.list:
        return options, []
    if not options.steps:
        parser.error("name a step, all, or collect; --list tells which there are")
    if options.out is None:
        parser.error("--out DIR is needed")
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data must be a file, got {options.data}, which is none")
    return options, [] if options.steps == ["collect"] else chosen(options.steps, parser)


def main(arguments: list[str] | None = None, supervised: bool = True) -> int:
    """The exit code. supervised False, for a rehearsal: in this process, where no row has a limit."""
    options, steps = parsed(arguments)
    if options.list:
        print(listing())
        return 0
    if not steps:
        from .gpu import collect

        print(collect.write(options.out))
        return 0
    end = time.monotonic() + 60 * options.minutes
    if options.worker:
        supervision.leave(worker(steps, options, end))
    if supervised:
        files = [options.out / f"{step.name}.json" for step in steps]
        code = supervision.supervise(lambda number: command(steps, options, end, number), end, files)
        if code == supervision.REFUSED:
            return 1
    else:
        code = prepared(steps, options, end, limits=False)
    return max(closing_lines(steps, options), min(code, 1))


if __name__ == "__main__":
    sys.exit(main())
