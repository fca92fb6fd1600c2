"""A task function on its way through the driver, which has no use for what it imports."""

import os
import pickle
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard
from uuid import uuid4

from djdist._job import Job, Report, TaskFunction

LARGE_BYTES = 1_000_000
"""Less than this travels with each task: asking for it would take longer."""
Sendable = Callable[[Sequence[Job]], Report | None]
"""A task function, or what stands for it in a task; None: the process has to be sent the function."""

MOST_KEPT = 100
"""A process may make the keys of all tables of a pipeline in turn."""
MOST_BYTES_KEPT = 500_000_000


@dataclass(frozen=True)
class PickledTask:
    """A task function that is unpickled only where it is called, and once in each process there."""

    pickled: bytes = field(repr=False)
    name: str = field(default_factory=lambda: uuid4().hex, compare=False)

    def __call__(self, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs on a worker."""
        return _kept.get(self.name, lambda: self)(jobs)


@dataclass(frozen=True)
class FetchedTask:
    """Stands in a task for a function that a process fetches when it meets it for the first time."""

    name: str
    fetch: Callable[[], PickledTask] = field(repr=False)

    def __call__(self, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs on a worker."""
        return _kept.get(self.name, self.fetch)(jobs)


@dataclass(frozen=True)
class SentTask:
    """Stands in a task for a function that a process may have been sent before."""

    name: str

    def __call__(self, jobs: Sequence[Job]) -> Report | None:
        """Make a group of jobs on a worker that has the function."""
        function = _kept.find(self.name)
        return function(jobs) if function else None


def fetched(function: TaskFunction, fetch: Callable[[], PickledTask]) -> TaskFunction:
    """Return what tasks hold where workers can fetch what is large."""
    return FetchedTask(function.name, fetch) if _is_large(function) else function


def sent(function: TaskFunction) -> Sendable:
    """Return what tasks hold where a worker can only be sent again what it lacks."""
    return SentTask(function.name) if _is_large(function) else function


def _is_large(function: TaskFunction) -> TypeGuard[PickledTask]:
    return isinstance(function, PickledTask) and len(function.pickled) >= LARGE_BYTES


class _Kept:
    """The last task functions of this process, unpickled; those of a fork's parent are not its own."""

    def __init__(self) -> None:
        self._functions: dict[tuple[int, str], tuple[TaskFunction, int]] = {}
        self._lock = threading.Lock()

    def find(self, name: str) -> TaskFunction | None:
        function, _ = self._functions.get((os.getpid(), name), (None, 0))
        return function

    def get(self, name: str, fetch: Callable[[], PickledTask]) -> TaskFunction:
        with self._lock:  # the threads of a worker need it once, too
            return self.find(name) or self._keep(name, fetch().pickled)

    def _keep(self, name: str, pickled: bytes) -> TaskFunction:
        self._make_room(len(pickled))
        function: TaskFunction = pickle.loads(pickled)
        self._functions[os.getpid(), name] = function, len(pickled)
        return function

    def _make_room(self, size: int) -> None:
        """Drop the oldest ones, whose runs are usually over; if not, they are sent again."""
        while self._functions and (
            len(self._functions) >= MOST_KEPT
            or size + sum(s for _, s in self._functions.values()) > MOST_BYTES_KEPT
        ):
            del self._functions[next(iter(self._functions))]

    @property
    def _bytes(self) -> int:
        return sum(size for _, size in self._functions.values())


_kept = _Kept()
