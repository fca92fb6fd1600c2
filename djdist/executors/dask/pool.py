"""The tasks of one run on Dask."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

import distributed

from djdist._job import Breakage, BreakageKind, Completion, Counts, Job, Report, TaskFunction
from djdist._needs import Needs, Node
from djdist._task_pool import TaskPool, what_is_made
from djdist.executors.dask.offers import fetch, offered
from djdist.executors.dask.placing import Placing, resources_of
from djdist.executors.dask.worker_side import with_plugin
from djdist.executors.dask.workers import Workers
from djdist.shipping.pickled_task import PickledTask, fetched

KINDS: dict[type[BaseException], BreakageKind] = {
    distributed.scheduler.NoValidWorkerError: BreakageKind.REFUSED,
}
SWITCH_SECONDS = 60.0
"""A table that waits so long for a GPU gets it, although what another one has loaded there is lost."""
GONE = "The Dask worker that made it died."
OVER_LIMIT = "The nanny of the Dask worker at {} ended it over its limit of memory."
shown: dict[tuple[str, str], str] = {}


def counts_here(worker: distributed.Worker) -> str:
    """Return how the runs stand whose drivers are in this process."""
    return "; ".join(list(shown.values()))


class _Waiting(NamedTuple):
    table: str
    jobs: tuple[Job, ...]
    needs: Needs
    since: float


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
        self._waiting: dict[int, _Waiting] = {}
        self._placing = Placing(workers)
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
        self._waiting[self._submitted] = _Waiting(table, tuple(jobs), needs, time.monotonic())
        self._fill()
        return self._submitted

    def _fill(self) -> None:
        """Send what has a place, in order; what has none holds back only what needs as much."""
        held: set[tuple[str, Needs]] = set()
        for ticket, waiting in list(self._waiting.items()):
            kind = waiting.table, waiting.needs
            place = (
                None if kind in held else self._placing.place(ticket, *kind, yields_to=self._before(waiting))
            )
            if place is None:
                held.add(kind)
            else:
                del self._waiting[ticket]
                self._send(ticket, waiting, place)

    def _before(self, waiting: "_Waiting") -> set[str]:
        """Return the tables that go first where they have loaded what they need, but not for ever."""
        is_late = time.monotonic() - waiting.since >= SWITCH_SECONDS
        return set() if is_late else {other.table for other in self._waiting.values()} - {waiting.table}

    def _send(self, ticket: int, waiting: "_Waiting", place: dict[str, Any]) -> None:
        key = (waiting.table, what_is_made(waiting.jobs), f"{self._run}-{self._driver}-{ticket}")
        options = self._options | resources_of(waiting.needs) | place
        task = self._tasks[waiting.table]
        future = self._client.submit(task, waiting.jobs, key=key, retries=0, pure=False, **options)
        self._tickets[future] = ticket

    def wait(self, timeout_seconds: float) -> list[Completion]:
        if self._waiting and not self._tickets:
            time.sleep(timeout_seconds)  # for a worker; Dask doesn't wait where it has nothing to do
        with suppress(distributed.TimeoutError, distributed.CancelledError), self._client.as_current():
            distributed.wait(list(self._tickets), timeout_seconds, "FIRST_COMPLETED")
        ended = [future for future in self._tickets if future.done()]
        completions = [self._completion(self._tickets.pop(future), future) for future in ended]
        completions += self._lost_with_worker()
        for completion in completions:
            self._placing.leave(completion.ticket)
        self._workers.unfit |= {
            end.report.place for end in completions if end.report and end.report.setup_error
        }
        self._fill()
        return completions

    def _lost_with_worker(self) -> list[Completion]:
        """Give up what only a worker might do that is gone: Dask would wait for it to come back."""
        lost = self._placing.lost()
        futures = [future for future, ticket in self._tickets.items() if ticket in lost and not future.done()]
        if futures:
            self._client.cancel(futures)
        return [Completion(t, error=self._death(lost[t], GONE)) for t in map(self._tickets.pop, futures)]

    def _completion(self, ticket: int, future: "distributed.Future[Report]") -> Completion:
        try:
            return Completion(ticket, future.result())
        except distributed.KilledWorker as error:
            return Completion(ticket, error=self._death(error.last_worker.address, str(error)))
        except Exception as error:
            return Completion(ticket, error=Breakage.of(error, KINDS))

    def _death(self, worker: str, message: str) -> Breakage:
        """Say why a worker died, as far as its nanny has told the scheduler."""
        if self._workers.has_restarted_for_memory(worker):
            return Breakage(BreakageKind.OUT_OF_MEMORY, OVER_LIMIT.format(worker))
        return Breakage(BreakageKind.WORKER_DIED, message)

    def cancel(self, ticket: int) -> bool:
        return self._waiting.pop(ticket, None) is not None

    def kill(self, ticket: int) -> None:
        """End the process of a task, but not the driver's own, where a make() that is overdue ends itself."""
        self.cancel(ticket)
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
        self._waiting.clear()
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
