"""How tests look at a run from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from psutil import Process, process_iter

import strays

SECONDS = 120


def wait_until(condition: Callable[[], Any], what: str = "", seconds: float = SECONDS) -> Any:
    """Wait for a condition and return what it gives."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what or condition}"
        time.sleep(0.02)
    return found


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do something in a thread while the test waits for a run."""
    errors: list[BaseException] = []

    def do() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=do)
    thread.start()
    yield
    thread.join()
    assert errors == []


def pid_of_ray_actor(kind: str) -> int:
    """Find the process of the youngest actor of a class on this session's clusters."""
    found = filter(strays.is_marked, process_iter(["cmdline", "create_time"]))
    actors = [process for process in found if _title(process).startswith(f"ray::{kind}")]
    return int(max(actors, key=lambda process: float(process.info["create_time"])).pid)


def _title(process: Process) -> str:
    return " ".join(process.info["cmdline"] or ())


def counts(table: Any) -> dict[str, int]:
    """Count a table's jobs by status, without those of which there are none."""
    return {status: count for status, count in table.jobs.progress().items() if count and status != "total"}
