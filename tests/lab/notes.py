"""Notes that a make() leaves in a folder, for checks from outside and for who wants to hit it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def noting(folder: Path, n: int | str) -> Iterator[None]:
    """Note that this process makes a session; mark it where another process is at it already.

    The kernel takes the lock away with the process, however that dies.
    """
    sessions, making = folder / "sessions", folder / "making" / str(os.getpid())
    for needed in (sessions, making.parent):
        needed.mkdir(exist_ok=True)
    with (sessions / str(n)).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (folder / f"twice-{n}-{os.getpid()}").touch()
        making.touch()
        try:
            yield
        finally:
            making.unlink(missing_ok=True)


def begun(folder: Path) -> int:
    """Count the sessions that were ever begun."""
    sessions = folder / "sessions"
    return len(os.listdir(sessions)) if sessions.exists() else 0


def making(folder: Path) -> list[int]:
    """Give the processes that are in the middle of a make()."""
    return [int(file.name) for file in folder.glob("making/*") if psutil.pid_exists(int(file.name))]


def made_twice_at_once(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("twice-*"))
