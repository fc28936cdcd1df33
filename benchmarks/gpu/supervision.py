"""One process waits while another, the worker, uses the GPU; where a worker ends too early the next one goes on.

A worker is lost with the GPU's context (an illegal access), with a kernel that never ends, and with a crash; what it
had done stands in the files of the steps. The process that waits never touches CUDA, and imports torch only at its end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
ANEW, REFUSED = 75, 70  # exit codes of a worker: another one can go on; it cannot run here, and has said why
MOST_RESTARTS = 20
GRACE_S = 20  # for a worker that is told to end
MARK = "BENCHMARKS_ON_GPU_MARK"  # in the environment of a process that is ended with those it has started
WATCH_S = 2


def environment(mark: str, **more: str) -> dict[str, str]:
    """For a process that finds this checkout, installed or not, and that end_marked(mark) finds."""
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path).rstrip(os.pathsep), MARK: mark} | more


def new_mark() -> str:
    """A mark within the one of this process."""
    return f"{os.environ.get(MARK, '')}/{os.getpid()}-{time.monotonic_ns()}"


def end_marked(mark: str) -> None:
    """Kills every process but this one that was started with the mark, or one within it (Linux; elsewhere none)."""
    wanted = f"{MARK}={mark}/".encode()
    for held in Path("/proc").glob("[0-9]*/environ"):
        pid = int(held.parent.name)
        try:
            if pid != os.getpid() and any(
                (entry + b"/").startswith(wanted) for entry in held.read_bytes().split(b"\0")
            ):
                os.kill(pid, signal.SIGKILL)
        except OSError:  # it has ended, or belongs to somebody else
            continue


# ------------------------------------------------------------------------------------------------- the one that waits


def supervise(command: Callable[[int], list[str]], end: float, files: list[Path]) -> int:
    """Starts command(0), and command(1), ... as long as a worker ends too early and time is left.

    end: on the clock time.monotonic(); no worker is begun after it. files: what a worker writes when it begins a row.
    SIGTERM and SIGINT are passed on to the worker, after which none is begun.
    Returns 0 if a worker came to its end, time ran out or this process was told to end; REFUSED if the first worker
    could not run here; 1 if it gave up: after MOST_RESTARTS, or after a worker that ended before it began a row.
    """
    told: list[int] = []
    workers: list[subprocess.Popen] = []

    def tell(number: int, _frame: object) -> None:
        told.append(number)
        for worker in workers[-1:]:
            worker.send_signal(number)
            timer = threading.Timer(GRACE_S, worker.kill)
            timer.daemon = True
            timer.start()

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in range(MOST_RESTARTS + 1):
            if told:
                return 0
            held, mark = _written(files), new_mark()
            workers.append(subprocess.Popen(command(number), env=environment(mark)))
            try:
                code = workers[-1].wait()
            finally:
                end_marked(mark)
            if code == 0 or told:
                return 0
            if code == REFUSED:
                return REFUSED if number == 0 else 1
            if code != ANEW:
                print(f"the process that used the GPU ended with {_named(code)}", flush=True)
            if time.monotonic() > end:
                return 0
            if _written(files) == held:
                print("it had begun nothing, so no other is started", flush=True)
                return 1
            print(f"another one goes on ({number + 1} of at most {MOST_RESTARTS})", flush=True)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _written(files: list[Path]) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in files if path.exists()}


def _named(code: int) -> str:
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"


# ------------------------------------------------------------------------------------------------- the worker


def obey() -> None:
    """Of a worker: SIGTERM and SIGINT become SystemExit, once; it ends, with all it has started, if its parent does."""
    parent = os.getppid()

    def leave(number: int, _frame: object) -> None:
        for known in (signal.SIGTERM, signal.SIGINT):
            signal.signal(known, signal.SIG_IGN)
        raise SystemExit(128 + number)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        end_marked(os.environ[MARK])
        os._exit(ANEW)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    threading.Thread(target=watch, daemon=True).start()


def leave(code: int) -> NoReturn:
    """Ends a worker without the clean-up of libraries, which may wait for a GPU that is lost, or crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
