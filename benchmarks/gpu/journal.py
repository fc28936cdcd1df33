"""The record of one step, DIR/STEP.json: written anew after every row, so that a run that is cut loses nothing."""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
RUNNING, OK, FAILED, ERROR, LEFT_OUT, CUT = "running", "ok", "failed", "error", "left out", "cut"
CONCLUSION = "conclusion"
ATTEMPTS = 2  # a row that was cut that often (a crash, a hang, too long for a call) is not begun again
MESSAGE = 600  # characters kept of an error


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
    run once more. Raises: SystemExit if DIR holds a rehearsal and this is none, or the other way round.
    """

    folder: Path
    step: str
    rehearsal: bool
    end: float = math.inf
    again: bool = False
    rows: dict[str, Row] = field(default_factory=dict)
    complete: bool = False

    def __post_init__(self) -> None:
        if self.path.exists():
            held = json.loads(self.path.read_text(encoding="utf8"))
            if held["rehearsal"] != self.rehearsal:
                kind = "a rehearsal" if held["rehearsal"] else "results"
                raise SystemExit(f"{self.path} holds {kind}: take another --out")
            self.rows, self.complete = held["rows"], held["complete"]
        if self.again:
            self.rows = {key: row for key, row in self.rows.items() if row["status"] == OK}
            self.complete = False

    @property
    def path(self) -> Path:
        return self.folder / f"{self.step}.json"

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {"step": self.step, "rehearsal": self.rehearsal, "complete": self.complete, "rows": self.rows}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(held, indent=1, default=str), encoding="utf8")
        os.replace(partial, self.path)

    def run(self, key: str, job: Callable[[], Row]) -> None:
        """Runs job unless the file has its row; what it raises becomes part of the row.

        AssertionError: a check failed. LeftOut: it cannot run here. OutOfTime: it goes on in the next call, and this
        one does not count as an attempt. Anything else: an error.
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
        try:
            row = outcome(job)
        except OutOfTime:
            self._keep(key, {"status": RUNNING, "attempts": old["attempts"]})
            raise
        row = self._honest(row) | {"seconds": round(time.monotonic() - begin, 3)}
        self._keep(key, row)
        print(f"{self.step}: {key}: {row['status']} ({row['seconds']:.1f} s)", flush=True)
        free()

    def _keep(self, key: str, row: Row) -> None:
        self.rows[key] = row
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
    """Gives back the GPU's memory. Raises: DeviceLost if the GPU does not answer any more."""
    if not torch.cuda.is_available():
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:  # torch.AcceleratorError, RuntimeError: the name depends on torch's version
        raise DeviceLost(_short(error)) from None
