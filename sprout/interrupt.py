"""How a long-running process is told to end: once for "finish and save", twice for "now"."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a flag; the second one ends the process at once.

    ``with Interrupt() as stop: ...``; stop.signal is None or the signal's number, stop.exit_code 128 + its number, as
    shells do. Outside the main thread, where Python delivers no signals, it never triggers.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """0 when no signal came, else 128 + its number."""
        return 0 if self.signal is None else 128 + self.signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        log.warning("%s: finishing the step and saving; once more to end at once", signal.Signals(number).name)

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
