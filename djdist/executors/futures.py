"""Any ``concurrent.futures.Executor``: a process pool, loky, MPI, executorlib, Parsl …"""

import concurrent.futures as cf
import warnings
from collections.abc import Mapping, Sequence

from djdist._executor import Executor, default_slots
from djdist._job import Breakage, BreakageKind, Completion, Job, Report, TaskFunction
from djdist._needs import Needs, Node
from djdist._task_pool import TaskPool
from djdist.errors import ClusterError, OptionError
from djdist.shipping.pickled_task import Sendable, sent

KINDS: dict[type[BaseException], BreakageKind] = {cf.BrokenExecutor: BreakageKind.WORKER_DIED}
"""Why a process died a pool doesn't tell."""
RENAMED = "FuturesExecutor(places=) is slots= now; the old name goes with the next release."


class FuturesExecutor(Executor):
    """Runs tasks on a pool of ``concurrent.futures``, which it leaves open.

    Parameters
    ----------
    pool : concurrent.futures.Executor
        Where tasks run; workers must be processes with one task at a time.
    slots : int, optional
        How many tasks run at once. Default: the pool's number of workers.
    places : int, optional
        The old name of ``slots``.
    """

    can_kill = False

    def __init__(self, pool: cf.Executor, slots: int | None = None, places: int | None = None) -> None:
        if places is not None:
            warnings.warn(RENAMED, FutureWarning, stacklevel=2)
        self._pool = pool
        self._slots = slots or places or getattr(pool, "_max_workers", None) or default_slots()

    def __repr__(self) -> str:
        return f"FuturesExecutor({type(self._pool).__name__}, slots={self._slots})"

    def check_needs(self, table: str, needs: Needs) -> None:
        if needs != Needs():
            raise OptionError(
                f"A key of {table} needs {needs}, and {self!r} can't choose by that where it runs: use "
                'executor="ray", "dask" or "local", or needs=djdist.Needs() to leave it to the pool.'
            )

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        return _OnFutures(self._pool, self._slots, tasks)


class _OnFutures(TaskPool):
    """Runs one run's tasks on a pool that others may use, too."""

    may_grow = False

    def __init__(self, pool: cf.Executor, slots: int, tasks: Mapping[str, TaskFunction]) -> None:
        self._pool = pool
        self._nodes = (Node({"cpus": slots}, slots),)
        self._most_vain = slots + max(1, slots // 4)
        self._tasks = {table: (sent(work), work) for table, work in tasks.items()}
        self._running: dict[cf.Future[Report | None], tuple[int, str, tuple[Job, ...]]] = {}
        self._submitted = 0
        self._spared = 0

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        self._submitted += 1
        keeps_work = self._spared >= -self._most_vain  # else a new process has each task
        self._send(self._tasks[table][0 if keeps_work else 1], self._submitted, table, tuple(jobs))
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        done, _ = cf.wait(self._running, timeout_seconds, cf.FIRST_COMPLETED)
        return [completion for future in done if (completion := self._ended(future))]

    def cancel(self, ticket: int) -> bool:
        future = next((future for future, (other, *_) in self._running.items() if other == ticket), None)
        if future is None or not future.cancel():
            return False
        del self._running[future]
        return True

    def kill(self, ticket: int) -> None:
        """Can't be done: a pool doesn't say which of its processes has the task."""

    def close(self) -> None:
        for future in self._running:
            future.cancel()
        self._running.clear()

    def _send(self, work: Sendable, ticket: int, table: str, jobs: tuple[Job, ...]) -> None:
        try:
            future = self._pool.submit(work, jobs)
        except (cf.BrokenExecutor, RuntimeError) as error:
            taken = f"{type(self._pool).__name__} takes no more tasks: {error}. Make a new pool."
            raise ClusterError(taken) from error
        self._running[future] = ticket, table, jobs

    def _ended(self, future: "cf.Future[Report | None]") -> Completion | None:
        ticket, table, jobs = self._running.pop(future)
        completion = completion_of(ticket, future)
        self._spared = min(0, self._spared + (1 if completion else -1))
        if completion is None:
            self._send(self._tasks[table][1], ticket, table, jobs)
        return completion


def completion_of(ticket: int, future: "cf.Future[Report | None]") -> Completion | None:
    """Return what became of a task that has ended; None if its process has to be sent the work."""
    error = future.exception()
    if error is not None:
        return Completion(ticket, error=Breakage.of(error, KINDS))
    report = future.result()
    return None if report is None else Completion(ticket, report)
