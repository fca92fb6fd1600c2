"""The tasks of one run on Dask."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import uuid4

import distributed

from djdist._job import Breakage, BreakageKind, Completion, Counts, Job, Report, TaskFunction
from djdist._needs import Needs, Node
from djdist._task_pool import TaskPool, what_is_made
from djdist.executors.dask.offers import fetch, offered
from djdist.executors.dask.worker_side import with_plugin
from djdist.executors.dask.workers import Workers
from djdist.shipping.pickled_task import PickledTask, fetched

KINDS: dict[type[BaseException], BreakageKind] = {
    distributed.KilledWorker: BreakageKind.WORKER_DIED,
    distributed.scheduler.NoValidWorkerError: BreakageKind.REFUSED,
}
"""Why a worker died Dask doesn't tell."""
shown: dict[tuple[str, str], str] = {}


def counts_here(worker: distributed.Worker) -> str:
    """Return how the runs stand whose drivers are in this process."""
    return "; ".join(list(shown.values()))


class Pool(TaskPool):
    """Submits one run's tasks, which bear its name, so that those of other runs are left alone.

    Attributes
    ----------
    left : list of distributed.Future
        What went on as it was closed, because it shares a worker with the driver, which the caller ends.
    """

    has_dashboard = True

    def __init__(
        self, workers: Workers, run: str, tasks: Mapping[str, TaskFunction], own_worker: str = ""
    ) -> None:
        self._workers = workers
        self._client = workers.client
        self._options = workers.options
        self._run = run
        self._driver = uuid4().hex[:4]
        self._own_worker = own_worker
        self._offered: list[PickledTask] = []
        self._tasks = {table: partial(with_plugin, self._sent(work)) for table, work in tasks.items()}
        self._tickets: dict[distributed.Future[Report], int] = {}
        self._submitted = 0
        self.left: list[distributed.Future[Report]] = []

    def _sent(self, work: TaskFunction) -> TaskFunction:
        if not self._own_worker or not isinstance(work, PickledTask):
            return work
        offered[work.name] = work
        self._offered.append(work)
        return fetched(work, partial(fetch, self._own_worker, work.name))

    def show(self, table: str, counts: Counts, make_seconds: Sequence[float]) -> None:
        shown[self._run, table] = f"{table}: {counts.counts}"

    def nodes(self) -> Sequence[Node]:
        return self._workers.nodes()

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        self._submitted += 1
        key = (table, what_is_made(jobs), f"{self._run}-{self._driver}-{self._submitted}")
        options = self._options if "workers" in self._options else self._workers.aim() | self._options
        task = self._tasks[table]
        future = self._client.submit(task, tuple(jobs), key=key, retries=0, pure=False, **options)
        self._tickets[future] = self._submitted
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        with suppress(distributed.TimeoutError, distributed.CancelledError):
            distributed.wait(list(self._tickets), timeout_seconds, "FIRST_COMPLETED")
        ended = [future for future in self._tickets if future.done()]
        completions = [_completion(self._tickets.pop(future), future) for future in ended]
        self._workers.unfit |= {
            end.report.place for end in completions if end.report and end.report.setup_error
        }
        return completions

    def cancel(self, ticket: int) -> bool:
        return False

    def kill(self, ticket: int) -> None:
        """End the process of a task, but not the driver's own, where a make() that is overdue ends itself."""
        tasks = {future.key: future for future, running in self._tickets.items() if running == ticket}
        workers = set(self._workers.running(tasks.__contains__)) - {self._own_worker}
        if workers:
            self._client.cancel(list(tasks.values()))  # or Dask would begin it again elsewhere
            self._workers.restart(workers)

    def close(self) -> None:
        """End what runs, but for what shares a worker with the driver, which the caller ends."""
        for run, table in list(shown):
            if run == self._run:
                del shown[run, table]
        if self._tickets:
            workers = self._workers.running(partial(belongs_to, self._run))
            beside = workers.pop(self._own_worker, set())
            self.left = [future for future in self._tickets if future.key in beside]
            self._client.cancel([future for future in self._tickets if future.key not in beside])
            self._tickets.clear()
            self._workers.restart(workers)


def belongs_to(run: str, key: Any) -> bool:
    """Return whether a task is one of a run's keys."""
    return isinstance(key, tuple) and str(key[-1]).startswith(f"{run}-")


def _completion(ticket: int, future: "distributed.Future[Report]") -> Completion:
    try:
        return Completion(ticket, future.result())
    except Exception as error:
        return Completion(ticket, error=Breakage.of(error, KINDS))
