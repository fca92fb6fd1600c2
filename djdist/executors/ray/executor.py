"""Ray: the driver as an actor on the head node, keys as remote tasks."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray

from djdist._executor import ActorCall, Executor, Loop
from djdist._job import RunInfo, Status, Summary, TaskFunction, Watch
from djdist._needs import Needs
from djdist._settings import config
from djdist._task_pool import TaskPool
from djdist.driver.following import follow, supervise
from djdist.errors import DriverLostError
from djdist.executors.ray.actors import ClusterActors, answer, proxy, runs
from djdist.executors.ray.connection import Connection, is_sent_along
from djdist.executors.ray.modules import Caller
from djdist.executors.ray.nodes import ray_options
from djdist.executors.ray.pool import OnDriver
from djdist.executors.ray.workers import KeyOptions, get_ready


class RayExecutor(Executor):
    """Runs tasks on a Ray cluster.

    Parameters
    ----------
    address : str, optional
        The cluster's address, as ``ray.init`` takes it. Default: the cluster that this
        process is connected to, or that ``RAY_ADDRESS`` names, else a new one on this
        machine for the time of the call.
    num_cpus, num_gpus, memory : float, optional
        What one key needs, unless its table says so; memory in bytes. Default: one CPU.
    resources : dict, optional
        Custom resources that one key needs, unless its table says so.
    runtime_env : dict, optional
        Ray's runtime environment of the tasks and the driver, for example
        ``{"working_dir": "."}`` to send the pipeline's code along. Folders and files of this
        machine travel only where this call connects; where the process is connected to Ray
        already, they belong into ``ray.init(runtime_env=…)``.
    **ray_options
        Any other option of Ray's tasks, for example ``scheduling_strategy``.
    """

    def __init__(
        self,
        address: str | None = None,
        num_cpus: float = 1,
        num_gpus: float = 0,
        memory: float | None = None,
        resources: dict[str, float] | None = None,
        runtime_env: dict[str, Any] | None = None,
        **ray_options: Any,
    ) -> None:
        sent_along = {p: v for p, v in (runtime_env or {}).items() if is_sent_along(p, v)}
        by_task = {p: v for p, v in (runtime_env or {}).items() if p not in sent_along}
        of_tasks = {"runtime_env": by_task} if by_task else {}
        self.needs = Needs(num_cpus, num_gpus, None if memory is None else int(memory), resources or {})
        self._keys = KeyOptions(ray_options | of_tasks, warm="max_calls" not in ray_options)
        self._actors = ClusterActors(of_tasks)
        self._connection = Connection(address, sent_along)
        self._caller = Caller()
        self._early: list[ray.ObjectRef[None]] = []

    def __repr__(self) -> str:
        return f"RayExecutor({self._connection.address or 'auto'})"

    def prepare(self, table: str) -> None:
        if ray.is_initialized() and self._connection.leads_anywhere:
            self._early = self._imports(table)
            self._actors.driver_host()

    def connect(self) -> None:
        self._caller = Caller.here()
        self._connection.join()

    def disconnect(self) -> None:
        self._connection.leave(self._actors.forget_all)

    def drive(self, loop: Loop, watch: Watch, info: RunInfo, predecessor: Status | None = None) -> Summary:
        return supervise(
            self,
            partial(self._drive_once, loop, info),
            watch,
            info,
            predecessor,
            lease_seconds=config.lease_seconds,
        )

    def _drive_once(self, loop: Loop, info: RunInfo, watch: Watch, predecessor: Status | None) -> Summary:
        early, self._early = self._early, []
        there = OnDriver(self._keys, self._caller, early or self._imports(info.table))
        host = self._actors.driver_host()
        call = proxy(host, info)
        try:
            begin = host.begin.options(name=f"djdist driver of {info.table}")
            answer(begin.remote(info, loop, there, config.lease_seconds, predecessor))
            return follow(call, watch)
        except DriverLostError:
            self._actors.forget(host)
            raise
        finally:
            call("forget")

    def _imports(self, table: str) -> "list[ray.ObjectRef[None]]":
        """Let a worker get ready while the driver does, unless it would need a GPU for that."""
        if self.needs.gpus:
            return []
        imports = self._keys.remote(get_ready, max_retries=0)
        return [imports.options(name=f"{table} (imports)", **ray_options(self.needs)).remote()]

    def check_detaches(self) -> None:
        if not (self._connection.address or ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
            super().check_detaches()

    def detach(self, loop: Loop, info: RunInfo) -> ActorCall:
        call = proxy(self._actors.detached_run(info, loop, self), info)
        call("status")
        return call

    def runs(self) -> list[tuple[RunInfo, ActorCall]]:
        return runs()

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        return OnDriver(self._keys, self._caller).open(tasks)
