"""Dask: the driver as an actor on a worker, keys as tasks."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import distributed

from djdist._executor import ActorCall, Executor, Loop
from djdist._job import RunInfo, Status, Summary, TaskFunction, Watch
from djdist._needs import Needs
from djdist._settings import config
from djdist._task_pool import TaskPool
from djdist.driver.following import follow, supervise
from djdist.driver.server import DriverActor
from djdist.errors import DriverLostError, OptionError
from djdist.executors.dask.connection import Connection
from djdist.executors.dask.pool import Pool, belongs_to
from djdist.executors.dask.runs import OnDriver, PublishedRuns
from djdist.executors.dask.worker_side import DRIVER
from djdist.executors.dask.workers import GPU, Workers, beside_others

logger = logging.getLogger(__name__)


class DaskExecutor(Executor):
    """Runs tasks on a Dask cluster.

    A worker makes one key at a time, however many threads it has, because a DataJoint connection
    serves one thread: give it one, unless ``make()`` computes with Dask.

    Parameters
    ----------
    cluster : distributed.Client or str, optional
        A client, or the scheduler's address. Default: the client that this process
        has, or the scheduler that ``DASK_SCHEDULER_ADDRESS`` names, else a new cluster
        on this machine for the time of the call.
    resources : dict, optional
        Worker resources that one key needs, unless its table says so; ``GPU`` is the one for GPUs.
    **dask_options
        Any other option of ``Client.submit``, for example ``priority`` or ``workers``.
    """

    def __init__(
        self,
        cluster: distributed.Client | str | None = None,
        resources: dict[str, float] | None = None,
        **dask_options: Any,
    ) -> None:
        custom = dict(resources or {})
        self.needs = Needs(gpus=custom.pop(GPU, 0), custom=custom)
        self._options = dask_options
        self._connection = Connection(cluster)

    def __repr__(self) -> str:
        return f"DaskExecutor({self._connection})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_cluster, (self._options, self.needs)

    def connect(self) -> None:
        self._connection.open()

    def disconnect(self) -> None:
        self._connection.close()

    def with_kill(self) -> Executor:
        client = self._connection.joined()
        if client and (beside := beside_others(client)):
            raise OptionError(
                f"timeout_seconds ends the process of a make() that takes too long, but {', '.join(beside)} "
                "is in the process of its client or scheduler: leave timeout_seconds out, or start workers "
                "as processes of their own, as LocalCluster(processes=True) does."
            )
        return self

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        return Pool(self._workers(), uuid4().hex[:8], tasks)

    def drive(self, loop: Loop, watch: Watch, info: RunInfo, predecessor: Status | None = None) -> Summary:
        with slot_given_up():
            return supervise(
                self,
                partial(self._drive_once, loop, info),
                watch,
                info,
                predecessor,
                lease_seconds=config.lease_seconds,
            )

    def _drive_once(self, loop: Loop, info: RunInfo, watch: Watch, predecessor: Status | None) -> Summary:
        client, workers, runs = self._connection.client, self._workers(), self._runs()
        if self._connection.joined() and not client.nthreads():
            logger.warning("The Dask cluster has no workers now; the run of %s waits for one", info.table)
        arguments = (loop, OnDriver(self._options, info.id), config.lease_seconds, predecessor)
        key = (DRIVER, info.table, uuid4().hex[:8])
        submitted = client.submit(DriverActor, *arguments, actor=True, key=key)
        belongs_to_run = partial(belongs_to, info.id)
        try:
            runs.publish(info, submitted)
            return follow(partial(runs.call_actor, submitted), watch)
        except DriverLostError:
            workers.restart(workers.still_running(belongs_to_run))
            raise
        finally:
            workers.restart(workers.running(belongs_to_run))
            runs.withdraw(info.id)
            submitted.release()

    def check_detaches(self) -> None:
        if not self._connection.lasts:
            super().check_detaches()

    def detach(self, loop: Loop, info: RunInfo) -> ActorCall:
        return self._runs().detach(loop, info, OnDriver(self._options, info.id))

    def runs(self) -> list[tuple[RunInfo, ActorCall]]:
        return self._runs().all()

    def _workers(self) -> Workers:
        return Workers(self._connection.client, self._options)

    def _runs(self) -> PublishedRuns:
        return PublishedRuns(self._connection.client, self.taken_result_kept_seconds)


@contextmanager
def slot_given_up() -> Iterator[None]:
    """Leave its slot to the keys, where ``populate()`` is called in a task of the cluster that makes them."""
    try:
        distributed.secede()
    except (AttributeError, KeyError, ValueError):  # it isn't, or has none
        yield
        return
    try:
        yield
    finally:
        distributed.rejoin()


def _without_cluster(options: dict[str, Any], needs: Needs) -> DaskExecutor:
    executor = DaskExecutor(**options)
    executor.needs = needs
    return executor
