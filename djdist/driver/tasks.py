"""The tasks in flight: submitted, and not ended."""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType

from djdist._job import Identity, Job
from djdist._job_store import JobStore
from djdist._needs import ONE_CPU, Needs
from djdist._task_pool import TaskPool
from djdist.driver.room import Room

MISSES = 2
"""What is missing for the first time may have been finished just then."""


@dataclass(eq=False)
class Task:
    """Jobs of one table that were submitted together.

    Attributes
    ----------
    running : Job or None
        What its worker was making when the store was last asked.
    running_since : float
        When it was first seen to do so.
    shares : int
        So many of its jobs may share a transaction: any of the first that are not done may be running.
    suspects : tuple of Job
        What may have been running when the store was last asked, the first of which counts as running.
    asks : bool
        Its worker is asked what its keys need, and makes none.
    misses : int
        How many renewals in a row have found none of its jobs to be the run's.
    """

    ticket: int
    jobs: tuple[Job, ...]
    submitted_at: float
    needs: Needs = ONE_CPU
    asks: bool = False
    shares: int = 1
    running: Job | None = None
    suspects: tuple[Job, ...] = ()
    running_since: float = 0.0
    misses: int = 0

    @property
    def table(self) -> str:
        """Whose keys they are."""
        return self.jobs[0].table

    @property
    def blocked(self) -> tuple[Job, ...]:
        """What waits behind the job that runs, or behind its transaction."""
        return self.jobs[self.jobs.index(self.running) + len(self.suspects) :] if self.running else ()

    @property
    def is_lost(self) -> bool:
        """Whether no job of it is the run's any more."""
        return self.misses >= MISSES

    def see(self, begun: Set[Identity], now: float) -> None:
        """Note which job runs: a worker makes them in order, and what it has made is gone."""
        self.suspects = tuple(islice((job for job in self.jobs if job.identity in begun), self.shares))
        running = next(iter(self.suspects), None)
        if running is not self.running:
            self.running, self.running_since = running, now

    def note_renewal(self, kept: Set[Identity]) -> None:
        """Note which jobs are still the run's; the lease does so from a thread of its own."""
        is_kept = any(job.identity in kept for job in self.jobs)
        self.misses = 0 if is_kept else self.misses + 1


class InFlight:
    """Keeps the tasks of a run.

    Parameters
    ----------
    store : JobStore
        Knows which jobs have begun.
    pool : TaskPool
        Runs the tasks.
    room : Room
        Is told what is in flight.
    clock : callable
        Seconds that pass.
    sharing : mapping of str to int
        How many keys of each table may share a transaction.

    Attributes
    ----------
    task_counts, job_counts : collections.Counter
        How many tasks there are of each table, and how many jobs in them; asked for at every step.
    """

    def __init__(
        self,
        store: JobStore,
        pool: TaskPool,
        room: Room,
        clock: Callable[[], float],
        sharing: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._store = store
        self._sharing = sharing
        self._pool = pool
        self._room = room
        self._clock = clock
        self._tasks: dict[int, Task] = {}
        self._in_flight: set[Identity] = set()
        self.task_counts, self.job_counts = Counter[str](), Counter[str]()

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._tasks.values()))  # the lease looks at them from a thread of its own

    def jobs(self) -> list[Job]:
        """Return all jobs in flight."""
        return [job for task in self for job in task.jobs]

    def not_in_flight(self, jobs: Sequence[Job]) -> list[Job]:
        """Return which of the jobs just reserved no task has: of a run that was frozen others may have taken
        and left some, which its tasks still make, and which a second task would only make twice.
        """
        return [job for job in jobs if job.identity not in self._in_flight]

    def submit(self, groups: Iterable[tuple[Needs, tuple[Job, ...]]], *, asks: bool = False) -> None:
        """Submit groups to be made, or asked what they need; give back what was not, if that fails."""
        waiting = deque(groups)
        try:
            while waiting:
                needs, jobs = waiting[0]
                sent = tuple(replace(job, asks=True) for job in jobs) if asks else jobs
                ticket = self._pool.submit(jobs[0].table, sent, needs)
                waiting.popleft()
                shares = self._sharing.get(jobs[0].table, 1)
                self._tasks[ticket] = Task(ticket, jobs, self._clock(), needs, asks, shares)
                self._room.take(ticket, needs, jobs[0].table)
                self._in_flight.update(job.identity for job in jobs)
                self.task_counts[jobs[0].table] += 1
                self.job_counts[jobs[0].table] += len(jobs)
        finally:
            if waiting:
                self._store.release([job for _, jobs in waiting for job in jobs])

    def pop(self, ticket: int) -> Task | None:
        """Forget a task that has ended or is to be ended, and return it."""
        task = self._tasks.pop(ticket, None)
        if task:
            self._in_flight.difference_update(job.identity for job in task.jobs)
            self.task_counts[task.table] -= 1
            self.job_counts[task.table] -= len(task.jobs)
            self._room.leave(ticket)
        return task

    def clear(self) -> None:
        """Forget all tasks."""
        for ticket in list(self._tasks):
            self.pop(ticket)

    def running(self) -> dict[str, int]:
        """Return how many tasks of each table run: a task makes one key at a time."""
        return {table: count - self._room.waiting[table] for table, count in self.task_counts.items()}

    def queued(self) -> dict[str, int]:
        """Return how many jobs of each table wait at the pool, or for others of their task."""
        running = self.running()
        return {table: count - running[table] for table, count in self.job_counts.items()}

    def look(self, tasks: Collection[Task]) -> None:
        """Ask the store which job of each task runs."""
        begun = {job.identity for job in self._store.begun([job for task in tasks for job in task.jobs])}
        now = self._clock()
        for task in tasks:
            task.see(begun, now)

    def running_in(self, task: Task) -> Job | None:
        """Return the job of a task that its worker was making, if that is known."""
        if self._store.sees_beginnings:
            self.look([task])
            return task.running if len(task.suspects) == 1 else None
        return task.jobs[0] if len(task.jobs) == 1 else None

    def lost(self) -> list[Task]:
        """Return the tasks of which no job is the run's any more."""
        return [task for task in self if task.is_lost]

    def withdraw_queued(self) -> None:
        """Give back what the cluster has not begun."""
        cancelled = [task for task in self if self._pool.cancel(task.ticket)]
        for task in cancelled:
            self.pop(task.ticket)
        self._store.release([job for task in cancelled for job in task.jobs])

    def withdraw_unstarted(self) -> None:
        """Give back what waits for others of its group."""
        self._leave_out(self._store.release_waiting(self.jobs()))

    def pop_blocked(self, tasks: Iterable[Task]) -> list[Job]:
        """Take out what waits behind a job that runs, and return it."""
        blocked = [job for task in tasks for job in task.blocked]
        self._leave_out(blocked)
        return blocked

    def _leave_out(self, jobs: Collection[Job]) -> None:
        left_out = {job.identity for job in jobs}
        self._in_flight -= left_out
        for task in self if left_out else ():
            left = tuple(job for job in task.jobs if job.identity not in left_out)
            if not left:
                self.pop(task.ticket)
            else:
                self.job_counts[task.table] -= len(task.jobs) - len(left)
                task.jobs = left
