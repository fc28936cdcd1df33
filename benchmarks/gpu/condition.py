"""The clocks, power and temperature of the GPU at a moment, by nvidia-smi: whether figures were taken at full speed."""

from __future__ import annotations

import shutil
import subprocess
import time

FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
# Why clocks are lowered, a bit mask; 0x1 is an idle GPU. Its name has changed with the drivers.
REASONS = ("clocks_throttle_reasons.active", "clocks_event_reasons.active")
PATIENCE_S = 20


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def read() -> dict[str, str] | None:
    """The fields by name, of the first GPU, and the time; None where nvidia-smi is not there or does not answer."""
    tool = shutil.which("nvidia-smi")
    for reasons in REASONS if tool else ():
        names = [*FIELDS, reasons]
        command = [str(tool), f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
        if done.returncode == 0 and len(values) == len(names):
            return {"datetime": now(), **dict(zip([*FIELDS, REASONS[0]], values, strict=True))}
    return None
