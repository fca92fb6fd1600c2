"""Finds and ends processes that the tests started and forgot."""

from __future__ import annotations

import os
import uuid

import psutil

MARK = "DJDIST_TEST_SESSION"
GRACE_SECONDS = 10

# companions of a process, Python's own and djdist's, which end with it
COMPANIONS = ("resource_tracker", "forkserver", "fork_server")


def mark_children() -> None:
    """Give all children a mark in their environment, which they keep when their parent dies."""
    os.environ[MARK] = uuid.uuid4().hex


def end_strays() -> list[str]:
    """Kill what still runs after a moment of grace, and return it as text."""
    _, alive = psutil.wait_procs(_strays(), timeout=GRACE_SECONDS)
    left = [_text(process) for process in alive]
    for process in alive:
        process.kill()
    return left


def _strays() -> list[psutil.Process]:
    found = {*psutil.Process().children(recursive=True), *filter(is_marked, psutil.process_iter())}
    return [process for process in found if process.pid != os.getpid() and not _is_companion(process)]


def is_marked(process: psutil.Process) -> bool:
    """Tell whether a process belongs to this session of tests, be it that its parent is dead."""
    try:
        return process.environ().get(MARK) == os.environ[MARK]
    except psutil.Error:
        return False


def _is_companion(process: psutil.Process) -> bool:
    return any(name in _text(process) for name in COMPANIONS)


def _text(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{process.pid}: gone"
