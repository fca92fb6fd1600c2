"""Any ``concurrent.futures.Executor``: a process pool, loky, MPI, executorlib, Parsl …"""

import concurrent.futures as cf
from collections.abc import Sequence

from djdist.errors import ClusterError
from djdist.executor import Executor, default_places, window
from djdist.job import Completion, Job, Report, Work


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
        self._tickets: dict[cf.Future[Report], int] = {}
        self._submitted = 0

    def __repr__(self) -> str:
        return f"FuturesExecutor({type(self._pool).__name__}, places={self._places})"

    def start(self, work: Work) -> None:
        self._work = work

    def places(self) -> int:
        return self._places

    def free_places(self) -> int:
        return window(self._places) - len(self._tickets)

    def submit(self, table: str, jobs: Sequence[Job]) -> int:
        try:
            future = self._pool.submit(self._work, tuple(jobs))
        except (cf.BrokenExecutor, RuntimeError) as error:
            raise ClusterError(f"{self!r} takes no more tasks: {error}. Make a new pool.") from error
        self._submitted += 1
        self._tickets[future] = self._submitted
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        done, _ = cf.wait(self._tickets, timeout_seconds, cf.FIRST_COMPLETED)
        return [completion_of(self._tickets.pop(future), future) for future in done]

    def cancel(self, ticket: int) -> bool:
        future = next((future for future, other in self._tickets.items() if other == ticket), None)
        if future is None or not future.cancel():
            return False
        del self._tickets[future]
        return True

    def kill(self, ticket: int) -> None:
        """Can't be done: a pool doesn't say which of its processes has the task."""

    def close(self) -> None:
        for future in self._tickets:
            future.cancel()
        self._tickets.clear()


def completion_of(ticket: int, future: "cf.Future[Report]") -> Completion:
    """Give what became of a task that has ended."""
    error = future.exception()
    if error is not None:
        return Completion.broken(ticket, error)
    return Completion(ticket, future.result())
