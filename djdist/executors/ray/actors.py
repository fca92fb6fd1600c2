"""Actors on the head node: drivers of runs whose caller waits, and runs that go on without one."""

import threading
import time
from functools import partial
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError

from djdist._executor import ActorCall, Executor, Loop
from djdist._job import RunInfo, Status, Summary
from djdist.driver.following import MAX_DRIVERS
from djdist.driver.server import DriverActor, result_or_error
from djdist.driver.shutdown import Shutdown
from djdist.errors import DjdistError, DriverLostError
from djdist.executors.ray.connection import connecting
from djdist.executors.ray.workers import spare_imports

NAMESPACE = "djdist"
LOOK_SECONDS = 5.0
RESULT_KEPT_SECONDS = 24 * 3600.0
HEAD_NODE = {"node:__internal_head__": 0.001}
_hosts: dict[tuple[str, str, str], Any] = {}
"""The actors for drivers that this process has, by where it is connected and what they need."""


class ClusterActors:
    """Starts actors on the head node, which the autoscaler keeps."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def driver_host(self) -> Any:
        """Return this process's actor for drivers; only its first run waits for the actor to start."""
        context = ray.get_runtime_context()
        here = (context.get_node_id(), context.get_job_id(), repr(self._options))
        with connecting:  # runs that begin at the same time share one
            if here not in _hosts:
                name = f"drivers {uuid4().hex[:8]}"
                _hosts[here] = self._actor(DriverHost, name, max_restarts=0).remote()
            return _hosts[here]

    def detached_run(self, info: RunInfo, loop: Loop, executor: Executor) -> Any:
        """Start what drives a run that goes on without its caller."""
        lasting = {"lifetime": "detached", "max_restarts": MAX_DRIVERS - 1, "max_task_retries": -1}
        name = f"run {info.id} of {info.table}"
        return self._actor(DetachedRun, name, **lasting).remote(info, loop, executor)

    def forget(self, lost: Any) -> None:
        """Let the next driver get another host than the one that was lost."""
        with connecting:
            for here in [here for here, host in _hosts.items() if host is lost]:
                del _hosts[here]

    def forget_all(self) -> None:
        """Forget the hosts of a connection that ends."""
        _hosts.clear()

    def _actor(self, kind: type[Any], name: str, **options: Any) -> Any:
        actor_class: Any = ray.remote(num_cpus=0, resources=HEAD_NODE)(kind)
        return actor_class.options(name=f"djdist {name}", namespace=NAMESPACE, **options, **self._options)


class DriverHost:
    """Keeps the drivers of one caller's runs."""

    def __init__(self) -> None:
        spare_imports()
        self._drivers: dict[str, tuple[RunInfo, DriverActor]] = {}

    def begin(
        self,
        info: RunInfo,
        loop: Loop,
        executor: Executor,
        patience_seconds: float,
        predecessor: Status | None,
    ) -> None:
        """Start the driver of a run."""
        self._drivers[info.id] = info, DriverActor(loop, executor, patience_seconds, predecessor)

    def ask(self, run: str, method: str) -> Any:
        """Call a method of a run's driver."""
        return getattr(self._drivers[run][1], method)()

    def forget(self, run: str) -> None:
        """Forget a run."""
        self._drivers.pop(run, None)

    def infos(self) -> list[RunInfo]:
        """Return which runs are here for callers of their own."""
        return [info for info, _ in self._drivers.values() if not info.detached]


class DetachedRun:
    """Stands in for the caller of a run that goes on without it, and keeps its result for a day.

    Once somebody has taken it, it is kept for an hour: who waited may have lost it.
    """

    def __init__(self, info: RunInfo, loop: Loop, executor: Executor) -> None:
        context = ray.get_runtime_context()
        self._predecessor = Status(begun=True) if context.was_current_actor_reconstructed else None
        self._info = info
        self._status = Status()
        self._shutdown = Shutdown()
        self._result: Summary | DjdistError | None = None
        self._taken = threading.Event()
        arguments = (executor, loop, context.current_actor)
        threading.Thread(target=self._drive, args=arguments, daemon=True).start()

    def ask(self, run: str, method: str) -> Any:
        """Call one of the methods that a handle knows."""
        return getattr(self, method)()

    def status(self) -> Status:
        """Return the run's progress."""
        return self._status

    def stop(self) -> None:
        """Stop the run: it reserves no more jobs."""
        self._shutdown.stop()

    def result(self) -> Summary | DjdistError | None:
        """Return the run's summary, or what ended it; None while it goes on."""
        return self._result

    def infos(self) -> list[RunInfo]:
        """Return which run it is."""
        return [self._info]

    def forget(self, run: str) -> None:
        """Note that somebody has the result."""
        self._taken.set()

    def _drive(self, executor: Executor, loop: Loop, me: Any) -> None:
        drive = partial(executor.drive, loop, self._watch, self._info, self._predecessor)
        self._result = result_or_error(drive)
        if self._taken.wait(RESULT_KEPT_SECONDS):
            time.sleep(executor.taken_result_kept_seconds)
        ray.kill(me)

    def _watch(self, status: Status) -> bool:
        self._status = status
        return not self._shutdown.is_stopping


def proxy(host: Any, info: RunInfo) -> ActorCall:
    """Return what asks an actor for one of its runs."""

    def call(method: str) -> Any:
        if method == "forget":
            return host.forget.remote(info.id)
        quietly = host.ask.options(enable_task_events=False)  # its page lists the keys only
        return answer(quietly.remote(info.id, method))

    return call


def answer(reference: Any) -> Any:
    """Wait for what an actor answers, which is lost with it."""
    try:
        return ray.get(reference)
    except RayError as error:
        raise DriverLostError(f"The run's driver was lost on the Ray cluster: {error}") from error


def runs() -> list[tuple[RunInfo, ActorCall]]:
    """Find the runs of all callers."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [run for actor in named if actor["namespace"] == NAMESPACE for run in _runs_of(actor["name"])]


def _runs_of(actor: str) -> list[tuple[RunInfo, ActorCall]]:
    try:
        host = ray.get_actor(actor, NAMESPACE)
        return [(info, proxy(host, info)) for info in ray.get(host.infos.remote(), timeout=LOOK_SECONDS)]
    except (RayError, ValueError):  # it has ended, or hangs
        return []
