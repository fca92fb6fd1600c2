"""Work on its way through the driver, which has no use for what it imports."""

import os
import pickle
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard
from uuid import uuid4

from djdist._job import Job, Report, Work

LARGE_BYTES = 1_000_000
"""Less than this travels with each task: to ask for it would take longer."""
Sendable = Callable[[Sequence[Job]], Report | None]
"""Work, or what stands for it in a task; None says that the process has to be sent the work."""

MOST_KEPT = 8
MOST_BYTES_KEPT = 500_000_000


@dataclass(frozen=True)
class PickledWork:
    """Work that is unpickled only where it is done, and once in each process there."""

    pickled: bytes = field(repr=False)
    name: str = field(default_factory=lambda: uuid4().hex, compare=False)

    def __call__(self, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs on a worker."""
        return _kept.get(self.name, lambda: self)(jobs)


@dataclass(frozen=True)
class FetchedWork:
    """Stands in a task for work that a process fetches when it meets it for the first time."""

    name: str
    fetch: Callable[[], PickledWork] = field(repr=False)

    def __call__(self, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs on a worker."""
        return _kept.get(self.name, self.fetch)(jobs)


@dataclass(frozen=True)
class SentWork:
    """Stands in a task for work that a process may have been sent before."""

    name: str

    def __call__(self, jobs: Sequence[Job]) -> Report | None:
        """Make a group of jobs on a worker that has the work."""
        work = _kept.find(self.name)
        return work(jobs) if work else None


def fetched(work: Work, fetch: Callable[[], PickledWork]) -> Work:
    """Give what tasks hold where workers can fetch what is large."""
    return FetchedWork(work.name, fetch) if _is_large(work) else work


def sent(work: Work) -> Sendable:
    """Give what tasks hold where a worker can only be sent again what it lacks."""
    return SentWork(work.name) if _is_large(work) else work


def _is_large(work: Work) -> TypeGuard[PickledWork]:
    return isinstance(work, PickledWork) and len(work.pickled) >= LARGE_BYTES


class _Kept:
    """The last works of this process, unpickled; those of a fork's parent are not its own."""

    def __init__(self) -> None:
        self._works: dict[tuple[int, str], tuple[Work, int]] = {}
        self._lock = threading.Lock()

    def find(self, name: str) -> Work | None:
        work, _ = self._works.get((os.getpid(), name), (None, 0))
        return work

    def get(self, name: str, fetch: Callable[[], PickledWork]) -> Work:
        with self._lock:  # the threads of a worker need it once, too
            return self.find(name) or self._keep(name, fetch().pickled)

    def _keep(self, name: str, pickled: bytes) -> Work:
        self._make_room(len(pickled))
        work: Work = pickle.loads(pickled)
        self._works[os.getpid(), name] = work, len(pickled)
        return work

    def _make_room(self, size: int) -> None:
        """Let go of the oldest ones, whose runs are over as a rule; else they are sent again."""
        while self._works and (
            len(self._works) >= MOST_KEPT or size + sum(s for _, s in self._works.values()) > MOST_BYTES_KEPT
        ):
            del self._works[next(iter(self._works))]


_kept = _Kept()
