"""A run on disk, for any model: its folder, metrics, checkpoints, lock, and how it ends when it is told to.

    RUN/config.json         what was asked for, with a format version
    RUN/environment.json    one entry per start: step, seed, versions, git commit, device
    RUN/metrics.jsonl       one JSON object per line, in order of step
    RUN/checkpoints/step-XXXXXXXX/      see sprout.checkpoint
    RUN/lock                host and pid of the process that writes here

Needs the extra `train` (safetensors, psutil, tqdm); no other part of the library.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import bio_kernels
import torch

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    random_state,
    read,
    read_manifest,
    seed_everything,
    set_random_state,
    write,
)
from .disk import DiskError, Lock, LockError, explained, remove_folder, remove_leftovers, replace_file
from .interrupt import Interrupt
from .progress import Reporter

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DiskError",
    "Interrupt",
    "LockError",
    "Reporter",
    "RunError",
    "RunFolder",
    "check_new",
    "checkpoints",
    "environment",
    "random_state",
    "read",
    "read_config",
    "read_metrics",
    "replace_file",
    "seed_everything",
    "set_random_state",
]

log = logging.getLogger(__name__)
FORMAT = 1
BROKEN = ".broken"


class RunError(RuntimeError):
    """A run folder cannot be used as asked; the message names it and the remedy."""


class RunFolder:
    """One run's folder, held by this process alone until ``close``.

    Make a new one with ``create``, continue one with ``resume``; both are context managers.
    """

    def __init__(self, path: Path, lock: Lock, keep: int) -> None:
        self.path, self.lock, self.keep = path, lock, keep

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: dict[str, Any],
        *,
        texts: dict[str, str] | None = None,
        keep: int = 2,
        force: bool = False,
    ) -> RunFolder:
        """A new run in a folder that does not exist, or is empty.

        Args: config, JSON's values; texts, further files, name -> content; keep >= 1, checkpoints to keep besides the
            best; force, see ``disk.Lock``.
        Raises: RunError if the folder holds anything; LockError if a process is making a run there; DiskError.
        """
        path = Path(path)
        check_new(path)
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = Lock(path / "lock", force=force)
        try:
            check_new(path)  # again: another process may have been first, and be gone by now
            (path / "checkpoints").mkdir(exist_ok=True)
            folder = cls(path, lock, keep)
            for name, content in (texts or {}).items():
                replace_file(path / name, content)
            folder.configure(config)  # last: with it the folder is a run
        except BaseException:
            lock.release()
            raise
        return folder

    @classmethod
    def resume(cls, path: str | Path, *, keep: int = 2, force: bool = False) -> RunFolder:
        """Continues a run. Raises: RunError if path is not a run folder; LockError if another process writes there."""
        path = Path(path)
        read_config(path)
        with explained(path):
            lock = Lock(path / "lock", force=force)
            (path / "checkpoints").mkdir(exist_ok=True)
            remove_leftovers(path, path / "checkpoints")
        return cls(path, lock, keep)

    @property
    def config(self) -> dict[str, Any]:
        """What the run was made with, without the format version. Raises: RunError."""
        return read_config(self.path)

    def configure(self, config: dict[str, Any]) -> None:
        """Replaces what ``config`` gives. Raises: DiskError."""
        replace_file(self.path / "config.json", json.dumps({"format": FORMAT, **config}, indent=1))

    def record_start(self, step: int, facts: dict[str, Any]) -> None:
        """Adds an entry to environment.json: this process continues at step with these facts."""
        file = self.path / "environment.json"
        starts = json.loads(file.read_text()) if file.exists() else []
        replace_file(file, json.dumps([*starts, {"step": step, **facts}], indent=1))

    def log(self, step: int, **values: Any) -> None:
        """Appends {"step": step, ...} to metrics.jsonl and hands it to the system. Raises: DiskError."""
        file = self.path / "metrics.jsonl"
        with explained(file), open(file, "a", encoding="utf8") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Every record of metrics.jsonl; a last line that was cut off is left out."""
        return read_metrics(self.path)

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes checkpoints/step-XXXXXXXX, then removes all but the newest ``keep`` and the one of lowest score.

        Raises: DiskError; then the earlier checkpoints are still there.
        """
        path = self.path / "checkpoints" / f"step-{checkpoint.step:08d}"
        write(path, checkpoint)
        complete = checkpoints(self.path)
        scores = {p: score for p in complete if (score := _score(p)) is not None}
        keep = {*complete[-self.keep :], *([min(scores, key=lambda p: scores[p])] if scores else [])}
        with explained(path.parent):
            for old in set(complete) - keep:
                remove_folder(old)
        return path

    def rewind(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, and a folder without what came after it; None if there is none.

        A damaged one is reported (logging.warning), renamed to ``*.broken`` and the one before it is tried; metrics of
        later steps are cut, so that no step appears twice. Raises: CheckpointError if there are only damaged ones.
        """
        found, problems = None, []
        for path in reversed(checkpoints(self.path)):
            try:
                found = read(path)
                break
            except CheckpointError as error:
                problems.append(str(error))
        if found is None and problems:
            raise CheckpointError(f"{self.path} has no checkpoint that can be read: {'; '.join(problems)}")
        for problem, path in zip(problems, reversed(checkpoints(self.path)), strict=False):
            assert found is not None
            log.warning("%s; falling back to step %d", problem, found.step)
            shutil.rmtree(path.with_name(path.name + BROKEN), ignore_errors=True)
            os.replace(path, path.with_name(path.name + BROKEN))
        self._cut(0 if found is None else found.step)
        return found

    def _cut(self, step: int) -> None:
        file = self.path / "metrics.jsonl"
        kept = [record for record in self.metrics() if record["step"] <= step]
        if file.exists():
            replace_file(file, "".join(json.dumps(record) + "\n" for record in kept))

    def close(self) -> None:
        """Releases the lock."""
        self.lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_new(path: Path) -> None:
    """Raises RunError unless path does not exist or is an empty folder (a lock does not count)."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; name a new folder with --out")
    if path.is_dir() and any(entry.name != "lock" for entry in path.iterdir()):
        hint = f"continue it with --resume {path}" if (path / "config.json").exists() else "it is not a run's"
        raise RunError(f"{path} exists and is not empty ({hint}); name a new folder with --out")


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a run, without the format version. Raises: RunError that names the file."""
    file = path / "config.json"
    if not file.is_file():
        raise RunError(f"{path} is not a run folder: {file} is missing")
    try:
        config = json.loads(file.read_text(encoding="utf8"))
        version = config.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunError(f"{file} is damaged: {error!r}") from None
    if version != FORMAT:
        raise RunError(f"{file} has format {version!r}, this version reads {FORMAT}")
    return config


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of RUN/metrics.jsonl in their order; a last line that was cut off is left out. Raises: RunError."""
    file = path / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break was not finished
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{file}, line {number} is damaged ({error}); remove that line") from None
    return records


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones among them."""
    return sorted(p for p in (path / "checkpoints").glob("step-*") if p.is_dir() and p.name[5:].isdigit())


def _score(path: Path) -> float | None:
    try:
        return read_manifest(path)["score"]
    except CheckpointError:
        return None


def environment(seed: int, device: str) -> dict[str, Any]:
    """What a run depends on besides its config: seed, versions, git commit (if the code lies in a checkout), device."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton}
    return {
        "seed": seed,
        "versions": {**versions, "bio_kernels": bio_kernels.__version__},
        "git": git_commit(Path(__file__).parent),
        "device": device,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout that tracks this file, with "+" if something in it was changed; None without one."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
