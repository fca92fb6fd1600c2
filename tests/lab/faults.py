"""Faults: each finds its victim among the test's own processes and hits it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from lab import notes
from lab.calling import TAKE_OVER, Caller
from lab.clusters import Place
from lab.watching import wait_until
from servers import Daemon

Victim = TypeVar("Victim")

LONGEST_OUTAGE_SECONDS = 2.0


@dataclass
class Scene:
    """A run, and all that can be hit while it goes on."""

    caller: Caller
    place: Place
    database: Daemon | None
    chance: random.Random
    _running: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        self._running = self.caller.start()

    @property
    def call(self) -> subprocess.Popen[bytes]:
        """The call that goes on."""
        assert self._running
        return self._running

    def ended(self) -> bool:
        return self.call.poll() is not None

    def driver(self) -> int | None:
        return None if self.ended() else self.place.driver(self.call.pid)


def kill_a_worker(scene: Scene) -> bool:
    """Kill a worker in the middle of a make()."""
    workers = _find(scene, lambda: notes.making(scene.caller.folder))
    return workers is not None and _send(scene.chance.choice(workers), signal.SIGKILL)


def kill_the_driver(scene: Scene) -> bool:
    driver = _find(scene, scene.driver)
    return driver is not None and _send(driver, signal.SIGKILL)


def stop_the_driver_for_a_while(scene: Scene) -> bool:
    """Stop the driver until another run has taken over what it held, and made some of it."""
    driver = _find(scene, scene.driver)
    if driver is None or not _send(driver, signal.SIGSTOP):
        return False
    try:
        scene.caller.do(TAKE_OVER)
    finally:
        _send(driver, signal.SIGCONT)
    return True


def lose_a_node(scene: Scene) -> bool:
    """Kill what runs a node of the cluster, and add another node."""
    scene.place.lose_node(scene.chance)
    return True


def kill_the_caller(scene: Scene) -> bool:
    """Kill the caller, and start the same call again."""
    scene.call.kill()
    scene.call.wait()
    scene.start()
    return True


def restart_the_database(scene: Scene) -> bool:
    """Let the database die like in a power failure, and come back after a while."""
    assert scene.database
    scene.database.kill()
    time.sleep(scene.chance.uniform(0, LONGEST_OUTAGE_SECONDS))
    scene.database.start()
    return True


Fault = Callable[[Scene], bool]
"""Tells whether it found its victim."""

FAULTS: Sequence[Fault] = (
    kill_a_worker,
    kill_the_driver,
    stop_the_driver_for_a_while,
    lose_a_node,
    kill_the_caller,
    restart_the_database,
)


def faults_of(executor: str) -> list[Fault]:
    """Give the faults that an executor can have; without a cluster the caller is the driver."""
    local = {"kill_the_driver", "lose_a_node"}
    left_out = {"local": local | {"kill_a_worker"}, "processes": local}
    return [fault for fault in FAULTS if fault.__name__ not in left_out.get(executor, set())]


def may_overlap(fault: Fault, executor: str) -> bool:
    """Tell whether a fault may let two runs make one key at the same time, which no lease can prevent.

    A driver's process that makes keys as well is stopped in the middle of one, and
    goes on with it when another run has long taken it over. The fence then stops it.
    """
    return fault is stop_the_driver_for_a_while and executor in ("local", "dask")


def _find(scene: Scene, find: Callable[[], Victim | None]) -> Victim | None:
    """Wait for a victim as long as the call goes on."""
    found: list[Victim | None] = []

    def found_or_ended() -> bool:
        found.append(find())
        return bool(found[-1]) or scene.ended()

    wait_until(found_or_ended, "a victim")
    return found[-1] or None


def _send(pid: int, number: signal.Signals) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False
