"""The runs that a Dask scheduler knows, and how those that go on without a caller are driven."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import cloudpickle
import distributed

from djdist._executor import ActorCall, Executor, Loop
from djdist._job import RunInfo, Status, Summary, TaskFunction
from djdist._task_pool import TaskPool
from djdist.driver.following import POLL_SECONDS
from djdist.driver.server import result_or_error
from djdist.driver.unmet import warning_of_unmet
from djdist.errors import ClusterError, DjdistError, DriverLostError
from djdist.executors.dask.offers import fetch, offer
from djdist.executors.dask.pool import Pool, belongs_to, counts_here
from djdist.executors.dask.worker_side import DRIVER
from djdist.executors.dask.workers import LOST, Workers


@contextmanager
def as_driver_lost() -> Iterator[None]:
    """Say of what Dask raises that the driver is gone."""
    try:
        yield
    except LOST as error:
        raise DriverLostError(f"The run's driver was lost on the Dask cluster: {error}") from error


class OnDriver(Executor):
    """What a run's driver has of its executor, in the worker where it is."""

    def __init__(self, options: dict[str, Any], run: str) -> None:
        self._options = options
        self.run = run
        self._pool: Pool | None = None

    def __repr__(self) -> str:
        return f"DaskExecutor({self.client})"

    def attach(self) -> None:
        self.client = distributed.get_client()
        self.workers = Workers(self.client, self._options)
        worker = distributed.get_worker()
        worker.metrics["djdist"] = counts_here  # the dashboard has a column for it on the page of workers
        worker.handlers[fetch.__name__] = offer
        self._worker = worker.address

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        self._pool = Pool(self.workers, self.run, tasks, self._worker)
        return self._pool

    def abandon(self) -> None:
        PublishedRuns(self.client).withdraw(self.run)
        self.end_left()

    def end_left(self) -> None:
        """End what the closed pool left, with this driver's own process."""
        if self._pool and self._pool.left:
            self.workers.restart({self._worker})


class PublishedRuns:
    """What the scheduler keeps of runs: who drives each, and when somebody had its result."""

    def __init__(self, client: distributed.Client, taken_result_kept_seconds: float = 0) -> None:
        self._client = client
        self._kept_seconds = taken_result_kept_seconds

    def all(self) -> list[tuple[RunInfo, ActorCall]]:
        """Find the runs of all callers."""
        self._withdraw_taken()
        names = [name for name in self._client.list_datasets() if str(name).startswith(published(""))]
        found = [self._client.get_dataset(name, None) for name in names]
        return [(info, self._proxy(info, future)) for info, future in filter(None, found)]

    def detach(self, loop: Loop, info: RunInfo, executor: OnDriver) -> ActorCall:
        """Start a run as a task, which lives without this process once the scheduler has it."""
        self._withdraw_taken()
        key = (DRIVER, info.table, info.id)
        future = self._client.submit(drive_as_task, loop, executor, key=key, pure=False)
        self.publish(info, future)
        while not self._client.run_on_scheduler(_has_task, future.key):
            time.sleep(POLL_SECONDS / 10)
        return self._proxy(info, future)

    def publish(self, info: RunInfo, driver: "distributed.Future[Any]") -> None:
        """Let others find a run."""
        self._client.publish_dataset((info, driver), name=published(info.id), override=True)

    def withdraw(self, run: str) -> None:
        """Make the scheduler forget a run."""
        with suppress(*LOST):
            self._client.unpublish_dataset(published(run))
            self._client.set_metadata(place(run), {})

    def call_actor(self, actor: "distributed.Future[Any]", method: str) -> Any:
        """Ask a driver."""
        with as_driver_lost(), self._client.as_current():
            return getattr(actor.result(), method)().result()

    def _proxy(self, info: RunInfo, driver: "distributed.Future[Any]") -> ActorCall:
        mailbox = RunMailbox(self._client, info.id, driver)

        def call(method: str) -> Any:
            if method == "forget":
                return self._client.set_metadata([*place(info.id), "taken"], time.time())
            with as_driver_lost():
                return getattr(mailbox, method)() if info.detached else self.call_actor(driver, method)

        return call

    def _withdraw_taken(self) -> None:
        """Make the scheduler forget runs whose result was fetched long ago."""
        told: dict[str, dict[str, Any]] = self._client.get_metadata(["djdist"], {})
        long_ago = time.time() - self._kept_seconds
        for run in [run for run, kept in told.items() if kept.get("taken", long_ago) < long_ago]:
            self.withdraw(run)


class RunMailbox:
    """Where the driver of a detached run, which is a task, and who looks at it leave word for each other."""

    def __init__(
        self, client: distributed.Client, run: str, driver: "distributed.Future[Any] | None" = None
    ) -> None:
        self._client = client
        self._driver = driver
        self._place = place(run)
        self._written_at = float("-inf")
        self._status = Status()

    def status(self) -> Status:
        return self.last() or Status()

    def last(self) -> Status | None:
        status: Status | None = self._read("status")
        return status

    def stop(self) -> None:
        self._write("stop", True)

    def begin(self, status: Status) -> None:
        """Leave a note for the next driver that there was one."""
        self._write("status", status)

    def watch(self, status: Status) -> bool:
        self._status = status
        if time.monotonic() - self._written_at < POLL_SECONDS:
            return True
        self._write("status", status)
        self._written_at = time.monotonic()
        return not self._read("stop")

    def end(self, result: Summary | DjdistError) -> None:
        self._write("status", self._status)
        self._write("result", result)

    def result(self) -> Summary | DjdistError | None:
        result: Summary | DjdistError | None = self._read("result")
        if result is None and self._driver and self._driver.status in ("error", "cancelled", "lost"):
            return ClusterError(f"The cluster lost the run's driver: {self._driver.exception()!r}")
        return result

    def _read(self, name: str) -> Any:
        packed = self._client.get_metadata([*self._place, name], None)
        return None if packed is None else cloudpickle.loads(packed)

    def _write(self, name: str, value: Any) -> None:
        self._client.set_metadata([*self._place, name], cloudpickle.dumps(value))


def published(run: str) -> str:
    return f"djdist run {run}"


def place(run: str) -> list[str]:
    return ["djdist", run]


def _has_task(key: Any, dask_scheduler: distributed.Scheduler) -> bool:
    return key in dask_scheduler.tasks and dask_scheduler.tasks[key].run_spec is not None


def drive_as_task(loop: Loop, executor: OnDriver) -> None:
    """Do a detached run as a task, which Dask begins again if its worker dies, even after its end."""
    distributed.secede()
    executor.attach()
    mailbox = RunMailbox(executor.client, executor.run)
    if mailbox.result() is not None:
        return
    predecessor, workers = mailbox.last(), executor.workers
    mailbox.begin(predecessor or Status())
    workers.restart(workers.still_running(partial(belongs_to, executor.run)))
    mailbox.end(result_or_error(partial(loop, executor, warning_of_unmet(mailbox.watch), predecessor)))
    executor.end_left()
