"""The tasks in flight: submitted, and not ended."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from djdist._job import Identity, Job, Policy
from djdist._job_store import JobStore
from djdist._task_pool import TaskPool
from djdist.driver.grouping import Waiting
from djdist.driver.lease import Lease
from djdist.driver.overdue import Overdue


class Flight:
    """Knows the jobs of each task by its ticket, and which of them has begun, takes too long or is lost.

    Attributes
    ----------
    lease : Lease
        Renews their reservations while it is entered.
    overdue : Overdue
        Knows which take too long.
    """

    def __init__(
        self, store: JobStore, pool: TaskPool, policy: Policy, table: str, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._pool = pool
        self._table = table
        self._tasks: dict[int, tuple[Job, ...]] = {}
        self._waiting = Waiting(clock)
        self.lease = Lease(store, self.jobs, policy.lease_seconds)
        self.overdue = Overdue(policy.timeout_seconds, clock, sees_beginnings=store.sees_beginnings)

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def __len__(self) -> int:
        return sum(map(len, self._tasks.values()))

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return len(self._tasks)

    def jobs(self) -> list[Job]:
        """Give all jobs in flight; the lease asks for them from a thread of its own."""
        return [job for jobs in list(self._tasks.values()) for job in jobs]

    def submit(self, groups: Iterable[tuple[Job, ...]]) -> None:
        """Submit groups as tasks; give back what was not, if that fails."""
        waiting = deque(groups)
        try:
            while waiting:
                ticket = self._pool.submit(self._table, waiting[0])
                self._tasks[ticket] = waiting.popleft()
                self.overdue.note(ticket)
        finally:
            if waiting:
                self._store.release([job for jobs in waiting for job in jobs])

    def land(self, ticket: int) -> tuple[Job, ...]:
        """Forget a task that has ended or is to be ended; give its jobs."""
        self.overdue.forget(ticket)
        return self._tasks.pop(ticket, ())

    def clear(self) -> None:
        self._tasks.clear()

    def recall(self) -> None:
        """Give back what has not begun."""
        cancelled = [ticket for ticket in self._tasks if self._pool.cancel(ticket)]
        self._store.release([job for ticket in cancelled for job in self._tasks.pop(ticket)])
        with self.lease.held_off():  # what is locked would be taken for begun
            self._leave_out({job.identity for job in self._store.release_waiting(self.jobs())})

    def too_long(self) -> dict[int, Job]:
        """Give, when it is time to look, the tasks that run a job that takes too long."""
        if not self.overdue.asks():
            return {}
        running = self._running(self._tasks)
        return {ticket: running[ticket] for ticket in self.overdue.among(running)}

    def disowned(self) -> list[int]:
        """Give the tasks of which no job is the run's any more."""
        if not self.lease.any_gone:
            return []
        return [ticket for ticket, jobs in self._tasks.items() if all(map(self.lease.is_gone, jobs))]

    def take_waiting(self) -> list[Job]:
        """Take out what waits behind a key that takes long."""
        groups = self._waiting.suspects(self._tasks)
        waiting = self._waiting.behind(groups, self._running(groups)) if groups else {}
        for ticket, jobs in waiting.items():
            self._tasks[ticket] = tuple(job for job in groups[ticket] if job not in jobs)
        return [job for jobs in waiting.values() for job in jobs]

    def being_made(self, jobs: Sequence[Job]) -> Job | None:
        """Tell which job of a task its worker was making, if that is known."""
        if self._store.sees_beginnings:
            return self._running({0: jobs}).get(0)
        return jobs[0] if len(jobs) == 1 else None

    def _running(self, tasks: Mapping[int, Sequence[Job]]) -> dict[int, Job]:
        """Tell which job of each task runs: a worker makes them in order, and what it has made is gone."""
        begun = {job.identity for job in self._store.begun([job for jobs in tasks.values() for job in jobs])}
        left = {ticket: [job for job in jobs if job.identity in begun] for ticket, jobs in tasks.items()}
        return {ticket: jobs[0] for ticket, jobs in left.items() if jobs}

    def _leave_out(self, identities: set[Identity]) -> None:
        for ticket, jobs in list(self._tasks.items()):
            self._tasks[ticket] = tuple(job for job in jobs if job.identity not in identities)
            if not self._tasks[ticket]:
                del self._tasks[ticket]
