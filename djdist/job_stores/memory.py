"""Jobs kept in this process, for runs without a jobs table."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from djdist._job import Failure, Job, Key
from djdist._job_store import JobStore


class MemoryStore(JobStore):
    """Keeps the given keys, in their order, for one run.

    Parameters
    ----------
    table : str
        Whose keys they are.
    keys : iterable of dict
        What is to be made.
    """

    sees_beginnings = keeps_errors = False

    def __init__(self, table: str, keys: Iterable[Key] = ()) -> None:
        self._pending = deque(Job(table, key) for key in keys)
        self._reserved: dict[object, Job] = {}
        self._later: list[tuple[float, Job]] = []
        self._changing = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_changing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _changing=threading.Lock())

    def refresh(self) -> dict[str, int]:
        """Nothing to do: the keys are given once."""
        return {}

    def reserve(self, limit: int, max_priority: int | None = None) -> list[Job]:
        with self._changing:
            self._let_due_in()
            jobs = [self._pending.popleft() for _ in range(min(limit, len(self._pending)))]
            self._reserved |= {job.identity: job for job in jobs}
        return jobs

    def next_priority(self) -> int | None:
        """Return 0, which all jobs have here, as long as one is due."""
        return 0 if self.pending(1) else None

    def reserved(self) -> list[Job]:
        return list(self._reserved.values())

    def release(self, jobs: Sequence[Job], *, delay_seconds: float = 0) -> int:
        with self._changing:
            released = [job for job in jobs if self._reserved.pop(job.identity, None)]
            if delay_seconds:
                self._later += [(time.monotonic() + delay_seconds, job) for job in released]
            else:
                self._pending.extendleft(reversed(released))
        return len(released)

    def release_waiting(self, jobs: Sequence[Job]) -> list[Job]:
        """Return none: nobody notes here what has begun."""
        return []

    def release_all(self) -> None:
        self.release(list(self._reserved.values()))

    def fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> bool:
        with self._changing:  # another thread may be looking through them
            return self._reserved.pop(job.identity, None) is not None

    def leave_out(self, failed: Sequence[Job]) -> None:
        identities = {job.identity for job in failed}
        with self._changing:
            self._pending = deque(job for job in self._pending if job.identity not in identities)

    def forget(self, job: Job) -> None:
        with self._changing:
            self._reserved.pop(job.identity, None)

    def renew(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if job.identity in self._reserved]

    def rescue(self) -> int:
        return 0

    def begun(self, jobs: Sequence[Job]) -> list[Job]:
        return []

    def handed_back(self, jobs: Sequence[Job]) -> bool:
        return False

    def begun_by(self, host: str, pid: int) -> list[Job]:
        return []

    def pending(self, most: int | None = None) -> int:
        due = len(self._pending) + sum(at <= time.monotonic() for at, _ in self._later)
        return due if most is None else min(most, due)

    def _let_due_in(self) -> None:
        now = time.monotonic()
        self._pending += [job for due, job in self._later if due <= now]
        self._later = [(due, job) for due, job in self._later if due > now]
