"""Any ``concurrent.futures.Executor``: a process pool, loky, MPI, executorlib, Parsl …"""

import concurrent.futures as cf
from collections.abc import Sequence

from djdist._executor import Executor, default_places, window
from djdist._job import Completion, Job, Report, TaskFunction
from djdist.errors import ClusterError
from djdist.shipping.pickled_task import Sendable, sent


class FuturesExecutor(Executor):
    """Runs tasks on a pool of ``concurrent.futures``, which it leaves open.

    Parameters
    ----------
    pool : concurrent.futures.Executor
        Where tasks run; workers must be processes with one task at a time.
    places : int, optional
        How many tasks run at once. Default: the pool's number of workers.
    """

    kills = False

    def __init__(self, pool: cf.Executor, places: int | None = None) -> None:
        self._pool = pool
        self._places = places or getattr(pool, "_max_workers", None) or default_places()
        self._running: dict[cf.Future[Report | None], tuple[int, tuple[Job, ...]]] = {}
        self._submitted = 0
        self._spared = 0

    def __repr__(self) -> str:
        return f"FuturesExecutor({type(self._pool).__name__}, places={self._places})"

    def start(self, work: TaskFunction) -> None:
        self._work, self._sent = work, sent(work)

    def places(self) -> int:
        return self._places

    def free_places(self) -> int:
        return window(self._places) - len(self._running)

    def submit(self, table: str, jobs: Sequence[Job]) -> int:
        self._submitted += 1
        keeps_work = self._spared >= -window(self._places)  # else a new process has each task
        self._send(self._sent if keeps_work else self._work, self._submitted, tuple(jobs))
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        done, _ = cf.wait(self._running, timeout_seconds, cf.FIRST_COMPLETED)
        return [completion for future in done if (completion := self._ended(future))]

    def cancel(self, ticket: int) -> bool:
        future = next((future for future, (other, _) in self._running.items() if other == ticket), None)
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

    def _send(self, work: Sendable, ticket: int, jobs: tuple[Job, ...]) -> None:
        try:
            future = self._pool.submit(work, jobs)
        except (cf.BrokenExecutor, RuntimeError) as error:
            raise ClusterError(f"{self!r} takes no more tasks: {error}. Make a new pool.") from error
        self._running[future] = ticket, jobs

    def _ended(self, future: "cf.Future[Report | None]") -> Completion | None:
        ticket, jobs = self._running.pop(future)
        completion = completion_of(ticket, future)
        self._spared = min(0, self._spared + (1 if completion else -1))
        if completion is None:
            self._send(self._work, ticket, jobs)
        return completion


def completion_of(ticket: int, future: "cf.Future[Report | None]") -> Completion | None:
    """Give what became of a task that has ended; None if its process has to be sent the work."""
    error = future.exception()
    if error is not None:
        return Completion.broken(ticket, error)
    report = future.result()
    return None if report is None else Completion(ticket, report)
