"""Dask: the driver as an actor on a worker, keys as tasks."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any
from uuid import uuid4

import dask
import distributed

from djdist.driver_actor import DriverActor, follow, outlive
from djdist.errors import ClusterError, DjdistError, DriverLostError
from djdist.executor import Drive, Executor, default_places, window
from djdist.job import Completion, Job, Report, Summary, Watch, Work
from djdist.settings import config

logger = logging.getLogger(__name__)

PLACES_AGE_SECONDS = 1.0
RESTART_SECONDS = 30
IDLE_TIMEOUT = "10 minutes"
"""After it a cluster ends whose caller was killed before it could."""


class DaskExecutor(Executor):
    """Runs tasks on a Dask cluster.

    Give its workers one thread each: a DataJoint connection serves one thread, so a
    worker with several makes one key at a time all the same.

    Parameters
    ----------
    cluster : distributed.Client or str, optional
        A client, or the scheduler's address. Default: the client that this process
        has, or the scheduler that ``DASK_SCHEDULER_ADDRESS`` names, else a new cluster
        on this machine for the time of the call.
    resources : dict, optional
        Worker resources that one key needs, as ``Client.submit`` takes them.
    **dask_options
        Any other option of ``Client.submit``, for example ``priority`` or ``workers``.
    """

    def __init__(
        self,
        cluster: distributed.Client | str | None = None,
        resources: dict[str, float] | None = None,
        **dask_options: Any,
    ) -> None:
        self._cluster = cluster
        self._options = dask_options | ({"resources": resources} if resources else {})
        self._client: distributed.Client
        self._places = 0
        self._started: list[Any] = []
        self._tickets: dict[distributed.Future[Report], int] = {}
        self._submitted = 0
        self._counted_at = float("-inf")
        self._run = ""
        self._own_worker = ""
        self._left: list[distributed.Future[Report]] = []

    def __repr__(self) -> str:
        return f"DaskExecutor({self._cluster or 'auto'})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_cluster, (self._options, self._run)

    def connect(self) -> None:
        try:
            self._client = self._find_client()
        except (OSError, ValueError, distributed.TimeoutError) as error:
            raise ClusterError(
                f"Can't reach the Dask scheduler at {self._cluster or _configured_address()}: {error}. "
                "Check the address, or leave it out to start a cluster on this machine."
            ) from error

    def drive(self, run: Drive, watch: Watch, name: str) -> Summary:
        return outlive(lambda watch_all: self._drive_once(run, watch_all, name), watch)

    def _drive_once(self, run: Drive, watch: Watch, name: str) -> Summary:
        self._run = uuid4().hex[:8]
        key = ("djdist driver", name, self._run)
        patience_seconds = config.lease_seconds
        submitted = self._client.submit(DriverActor, run, self, patience_seconds, actor=True, key=key)
        try:
            with self._client.as_current():
                actor = submitted.result()
            return follow(lambda method: getattr(actor, method)().result(), watch)
        except DjdistError:
            raise
        except (OSError, RuntimeError, distributed.CancelledError, distributed.KilledWorker) as error:
            self._restart(self._still_running())
            raise DriverLostError(f"The run's driver was lost on the Dask cluster: {error}") from error
        except (KeyboardInterrupt, SystemExit):
            self._restart(self._tasks_of_workers(self._belongs_to_run))
            raise
        finally:
            submitted.release()

    def disconnect(self) -> None:
        while self._started:
            self._started.pop().close()

    def attach(self) -> None:
        self._client = distributed.get_client()
        self._own_worker = distributed.get_worker().address

    def start(self, work: Work) -> None:
        self._work = work
        self._run = self._run or uuid4().hex[:8]

    def free_places(self) -> int:
        return window(self._count_places()) - len(self._tickets)

    def submit(self, name: str, jobs: Sequence[Job]) -> int:
        self._submitted += 1
        table, _, key = name.partition("(")
        task = (table.strip(), key.rstrip(")"), f"{self._run}-{self._submitted}")
        future = self._client.submit(
            self._work, tuple(jobs), key=task, retries=0, pure=False, **self._options
        )
        self._tickets[future] = self._submitted
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        with suppress(distributed.TimeoutError, distributed.CancelledError):
            distributed.wait(list(self._tickets), timeout_seconds, "FIRST_COMPLETED")
        ended = [future for future in self._tickets if future.done()]
        return [_completion(self._tickets.pop(future), future) for future in ended]

    def cancel(self, ticket: int) -> bool:
        return False

    def kill(self, ticket: int) -> None:
        keys = {future.key for future, running in self._tickets.items() if running == ticket}
        self._restart(self._tasks_of_workers(keys.__contains__))

    def close(self) -> None:
        """End what runs, but for what shares a worker with the driver, which the caller ends."""
        if self._tickets:
            tasks = self._tasks_of_workers(self._belongs_to_run)
            beside = tasks.pop(self._own_worker, set())
            self._left = [future for future in self._tickets if future.key in beside]
            self._client.cancel([future for future in self._tickets if future.key not in beside])
            self._tickets.clear()
            self._restart(tasks)

    def abandon(self) -> None:
        if self._left:
            self._restart({self._own_worker})

    def _find_client(self) -> distributed.Client:
        if isinstance(self._cluster, distributed.Client):
            return self._cluster
        address = self._cluster
        if address is None:
            try:
                found: distributed.Client = distributed.default_client()
                return found
            except ValueError:
                address = _configured_address()
        return self._start_client(address)

    def _start_client(self, address: str | None) -> distributed.Client:
        if address is None:
            self._started.append(_local_cluster())
        client = distributed.Client(address or self._started[0], set_as_default=False)
        self._started.append(client)
        return client

    def _belongs_to_run(self, key: Any) -> bool:
        return isinstance(key, tuple) and str(key[-1]).startswith(f"{self._run}-")

    def _tasks_of_workers(self, wanted: Callable[[Any], bool]) -> dict[str, set[Any]]:
        """Find the workers that have some of these tasks."""
        tasks: dict[str, Sequence[Any]] = self._client.processing()
        found = {worker: set(filter(wanted, keys)) for worker, keys in tasks.items()}
        return {worker: keys for worker, keys in found.items() if keys}

    def _still_running(self) -> list[str]:
        """Find the workers that are still with the run, though the scheduler has forgotten its tasks."""
        keys: dict[str, list[Any]] = self._client.run(_keys_in_threads, on_error="ignore")
        return [worker for worker, running in keys.items() if any(map(self._belongs_to_run, running))]

    def _restart(self, workers: Iterable[str]) -> None:
        addresses = list(workers)
        if not addresses:
            return
        try:
            self._client.restart_workers(addresses, timeout=RESTART_SECONDS, raise_for_error=False)
        except ValueError as error:
            logger.warning(
                "Workers without a nanny can't be stopped; what runs there will change nothing: %s", error
            )

    def _count_places(self) -> int:
        now = time.monotonic()
        if now - self._counted_at >= PLACES_AGE_SECONDS:
            self._places = sum(self._client.nthreads().values())
            self._counted_at = now
        return self._places


def _local_cluster() -> distributed.SpecCluster:
    """Start a cluster whose workers, unlike LocalCluster's, don't run the caller's script again."""
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONWARNINGS": "ignore:No datajoint.json found",
    }
    return distributed.SubprocessCluster(
        n_workers=default_places(),
        threads_per_worker=1,
        worker_kwargs={"env": environment},
        scheduler_kwargs={"idle_timeout": IDLE_TIMEOUT, "allowed_failures": 0},
    )


def _keys_in_threads(dask_worker: distributed.Worker) -> list[Any]:
    return list(dask_worker.active_threads.values())


def _configured_address() -> str | None:
    address: str | None = dask.config.get("scheduler-address", None)
    return address


def _without_cluster(options: dict[str, Any], run: str) -> DaskExecutor:
    executor = DaskExecutor(**options)
    executor._run = run
    return executor


def _completion(ticket: int, future: "distributed.Future[Report]") -> Completion:
    try:
        return Completion(ticket, future.result())
    except Exception as error:
        return Completion(ticket, breakage=f"{type(error).__name__}: {error}")
