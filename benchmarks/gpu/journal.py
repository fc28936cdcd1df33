"""The record of one step, DIR/STEP.json: written anew after every row, so that a run that is cut loses nothing."""

from __future__ import annotations

import faulthandler
import gc
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..measure import FAILED_CAPTURES
from . import condition
from .supervision import ANEW

Row = dict[str, Any]
RUNNING, OK, FAILED, ERROR, LEFT_OUT, CUT = "running", "ok", "failed", "error", "left out", "cut"
CONCLUSION, STEP = "conclusion", "step"  # rows that are no row of a step
ATTEMPTS = 2  # a row that was cut that often (a crash, too long for a call) is not begun again
MESSAGE = 600  # characters kept of an error
SECOND_LINE_S = 30  # after its limit a row ends the process even if no thread of Python can run


class LeftOut(Exception):
    """Why a row cannot run here; raised by its job."""


class OutOfTime(Exception):
    """No row is begun any more in this call."""


class DeviceLost(Exception):
    """An error on the GPU made it useless to this process; another process can go on."""


@dataclass
class Journal:
    """Runs the rows of a step that are missing in its file.

    folder: DIR. end: on the clock time.monotonic(), after which no row is begun. again: rows that are not ok are
    run once more. limit: seconds of a row, after which this process ends; inf: none.
    Raises: SystemExit if DIR holds a rehearsal and this is none, or the other way round.
    """

    folder: Path
    step: str
    rehearsal: bool
    end: float = math.inf
    again: bool = False
    limit: float = math.inf
    rows: dict[str, Row] = field(default_factory=dict)
    complete: bool = False
    gpu: list[Row] = field(default_factory=list)  # at the start and end of each call that had rows to run
    _lock: Any = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        if self.path.exists():
            held = json.loads(self.path.read_text(encoding="utf8"))
            if held["rehearsal"] != self.rehearsal:
                kind = "a rehearsal" if held["rehearsal"] else "results"
                raise SystemExit(f"{self.path} holds {kind}: take another --out")
            self.rows, self.complete, self.gpu = held["rows"], held["complete"], held.get("gpu", [])
        if self.again:
            self.rows = {key: row for key, row in self.rows.items() if row["status"] == OK}
            self.complete = False

    @property
    def path(self) -> Path:
        return self.folder / f"{self.step}.json"

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {"step": self.step, "rehearsal": self.rehearsal, "complete": self.complete, "gpu": self.gpu}
        held["rows"] = self.rows
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(held, indent=1, default=str), encoding="utf8")
        os.replace(partial, self.path)

    def _keep(self, key: str, row: Row) -> None:
        with self._lock:
            self.rows[key] = row
            self.write()

    def run(self, key: str, job: Callable[[], Row]) -> None:
        """Runs job unless the file has its row; what it raises becomes part of the row.

        AssertionError: a check failed. LeftOut: it cannot run here. OutOfTime: it goes on in the next call, and this
        one does not count as an attempt. Anything else: an error. A row that takes longer than the limit is cut.
        Raises: OutOfTime before a row; DeviceLost after a row that left the GPU unusable.
        """
        old = self.rows.get(key, {"status": RUNNING, "attempts": 0})
        if old["status"] != RUNNING:
            return
        if old["attempts"] >= ATTEMPTS:
            self._keep(key, {"status": CUT, "message": f"begun {ATTEMPTS} times and never finished"})
            return
        if time.monotonic() > self.end:
            raise OutOfTime
        self._keep(key, {"status": RUNNING, "attempts": old["attempts"] + 1})
        begin = time.monotonic()
        with self._watched(key):
            try:
                row = outcome(job)
            except OutOfTime:
                self._keep(key, {"status": RUNNING, "attempts": old["attempts"]})
                raise
            row = self._honest(row) | {"seconds": round(time.monotonic() - begin, 3)}
            self._keep(key, row)
            print(f"{self.step}: {key}: {row['status']} ({row['seconds']:.1f} s)", flush=True)
            free()

    @contextmanager
    def _watched(self, key: str) -> Iterator[None]:
        """Within it the row is cut, and this process ended, where the limit is over: no exception ends a kernel.

        A thread does it, for torch waits for the GPU without the interpreter's lock. Where the lock is never given
        back, the process ends later without a word in the file, and the row is begun once more.
        """
        if math.isinf(self.limit):
            yield
            return
        over = threading.Event()

        def cut() -> None:
            with self._lock:
                if over.is_set():
                    return
                row = self._honest({"status": CUT, "message": f"took more than {self.limit:g} s"})
                self._keep(key, row)
                print(f"{self.step}: {key}: {CUT} ({row['message']})", flush=True)
                faulthandler.dump_traceback()
                os._exit(ANEW)

        timer = threading.Timer(self.limit, cut)
        timer.daemon = True
        timer.start()
        faulthandler.dump_traceback_later(self.limit + SECOND_LINE_S, exit=True)
        try:
            yield
        finally:
            with self._lock:
                over.set()
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The whole step runs within it; it is complete if nothing was raised.

        An error outside of its rows (an import, what names the rows) becomes a row too, and the step is tried again in
        the next call. Raises: OutOfTime, DeviceLost.
        """
        self.rows.pop(STEP, None)
        self._read_gpu("start")
        try:
            yield
            self.complete = True
        except (OutOfTime, DeviceLost):
            raise
        except Exception as error:
            self._keep(STEP, {"status": ERROR, "message": f"{type(error).__name__}: {_short(error)}"})
            print(f"{self.step}: {ERROR} outside of its rows: {_short(error)}", flush=True)
            free()
        finally:
            self._read_gpu("end")

    def _read_gpu(self, when: str) -> None:
        found = None if self.rehearsal else condition.read()
        if found is not None:
            self.gpu.append({"when": when, **found})
            self.write()

    def conclude(self, judge: Callable[[dict[str, Row]], Row]) -> None:
        """Keeps what judge makes of all rows so far as the row "conclusion", each time anew."""
        rows = {key: row for key, row in self.rows.items() if key != CONCLUSION}
        self.rows = rows | {CONCLUSION: self._honest(outcome(lambda: judge(rows)))}

    def _honest(self, row: Row) -> Row:
        """The row; in a rehearsal without what it says about its figures, which are none."""
        if not self.rehearsal:
            return row
        told = ("line", "lines", "targets")
        return {name: row[name] for name in row if name not in told} | {"rehearsal": "no figure here is a result"}


def outcome(job: Callable[[], Row]) -> Row:
    """What job returns with status ok, or the status and the message of what it raised. Raises: OutOfTime."""
    try:
        return {"status": OK, **job()}
    except OutOfTime:
        raise
    except LeftOut as reason:
        return {"status": LEFT_OUT, "message": _short(reason)}
    except AssertionError as error:
        return {"status": FAILED, "message": _short(error)}
    except Exception as error:  # a compiler, a driver, a peer, memory: whatever it is, the next row is tried
        return {"status": ERROR, "message": f"{type(error).__name__}: {_short(error)}"}


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MESSAGE else text[: MESSAGE // 2] + " ... " + text[-MESSAGE // 2 :]


def free() -> None:
    """Gives back the GPU's memory.

    Raises: DeviceLost if the GPU does not answer any more, or after a capture that failed (see FAILED_CAPTURES).
    """
    if FAILED_CAPTURES:
        raise DeviceLost(f"the capture of {FAILED_CAPTURES[0]} failed")
    if not torch.cuda.is_available():
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:  # torch.AcceleratorError, RuntimeError: the name depends on torch's version
        raise DeviceLost(_short(error)) from None
