"""Files that are either whole or not there, and a folder that one process at a time may write."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
TEMPORARY = ".tmp"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskError(OSError):
    """A file could not be written; the message names it and says whether the disk is full."""


class LockError(RuntimeError):
    """Another process writes this folder; the message names its host and pid."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a DiskError that names path and, where the disk is full, says so."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        full = error.errno in FULL
        what = "disk full" if full else "cannot write"
        remedy = "; free some space and resume" if full else ""
        raise DiskError(
            error.errno, f"{what}: {path} ({error.strerror}); what was there before is intact{remedy}"
        ) from error


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable; without effect where a folder cannot be opened (Windows)."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """Writes data and waits until it is on the disk. Raises: OSError. A reader may see half of it: see replace_file."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes | str) -> None:
    """Writes a file that is whole at any moment, the old content or the new. Raises: DiskError, the old file intact."""
    temporary = path.with_name(path.name + TEMPORARY)
    with explained(path):
        try:
            write_synced(temporary, data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives an empty temporary folder beside path that takes its name when the block ends well.

    A folder that has the name already is replaced. Whoever looks at path sees a whole folder, the old or the new one,
    or for an instant none. Raises: DiskError, the old folder intact; after any error the temporary one is removed.
    """
    temporary, old = path.with_name(path.name + TEMPORARY), path.with_name(path.name + ".old" + TEMPORARY)
    with explained(path):
        try:
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            sync_folder(temporary)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder such that no reader sees a part of it: it loses its name first."""
    doomed = path.with_name(path.name + ".old" + TEMPORARY)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(*folders: Path) -> None:
    """Removes what writers that were killed left in these folders: every name that ends in ``.tmp``."""
    for path in (path for folder in folders for path in folder.glob("*" + TEMPORARY)):
        log.info("removing %s, left by a process that was killed while it wrote", path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Lock:
    """A file that holds the host and pid of the one process that may write a folder.

    Args: path, of the lock file; force, take over a lock of another host or an unreadable one.
    Raises: LockError if a process that lives, or may live, holds it. A lock whose process on this host is gone (or
        whose pid belongs to a younger process) is taken over with a warning; a live one on this host never is.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path = path
        self.text = json.dumps(_identity())
        for _ in range(3):  # a lock taken over is made anew, unless a third process is faster
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._take_over(force)
                continue
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(self.text)
            except OSError:
                path.unlink()
                raise
            return
        raise LockError(f"{path} is being taken over by another process")

    def _take_over(self, force: bool) -> None:
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return
        refusal = self._refusal(text, force)
        if refusal:
            raise LockError(refusal)
        # Whoever renames it first has it. What was renamed may be a newer lock: then it is put back.
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}{TEMPORARY}")
        try:
            os.replace(self.path, aside)
        except FileNotFoundError:
            return
        if aside.read_text() != text:
            os.replace(aside, self.path)
            raise LockError(f"{self.path} was taken by another process a moment ago")
        log.warning("taking over %s, held by %s", self.path, text or "nobody (it is empty)")
        aside.unlink()

    def _refusal(self, text: str, force: bool) -> str | None:
        try:
            held = json.loads(text)
            host, pid, started = held["host"], int(held["pid"]), float(held["started"])
        except (ValueError, KeyError, TypeError):
            return None if force else f"{self.path} is not readable as a lock; if nothing writes there, use --force"
        if host == socket.gethostname():
            alive = started == _started(pid)
            return f"{self.path}: process {pid} on this host ({host}) writes there; end it first" if alive else None
        if force:
            return None
        return f"{self.path}: process {pid} on host {host} writes there; if it is gone, use --force"

    def release(self) -> None:
        """Removes the lock if it is still this process's own."""
        try:
            if self.path.read_text() == self.text:
                self.path.unlink()
        except FileNotFoundError:
            pass


def _started(pid: int) -> float | None:
    """When a process of this host began, seconds since the epoch; None if there is none. It tells reused pids apart."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def _identity() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
