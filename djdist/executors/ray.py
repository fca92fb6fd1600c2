"""Ray: the driver as an actor on the head node, keys as remote tasks."""

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.util.metrics import Counter, Gauge, Histogram

from djdist.driver.actor import MAX_DRIVERS, DriverActor, end_of, follow, outlive
from djdist.errors import ClusterError, DjdistError, DriverLostError
from djdist.executor import TAKEN_RESULT_KEPT_SECONDS, Ask, Executor, Loop, task_name, window
from djdist.job import Completion, Job, Report, RunInfo, Status, Summary, Watch, Work
from djdist.pickled_work import fetched
from djdist.settings import config

PLACES_AGE_SECONDS = 1.0
NAMESPACE = "djdist"
LOOK_SECONDS = 5.0
IMPORTS_SECONDS = 3.0
NAMED_TASKS = 1000
"""Ray's processes keep metrics for every name of a task, so that later ones have the table's only."""
RESULT_KEPT_SECONDS = 24 * 3600.0
BUCKET_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0]
HEAD_NODE = {"node:__internal_head__": 0.001}


class RayExecutor(Executor):
    """Runs tasks on a Ray cluster.

    Parameters
    ----------
    address : str, optional
        The cluster's address, as ``ray.init`` takes it. Default: the cluster that this
        process is connected to, or that ``RAY_ADDRESS`` names, else a new one on this
        machine for the time of the call.
    num_cpus, num_gpus, memory : float, optional
        What one key needs; memory in bytes. Default: one CPU.
    resources : dict, optional
        Custom resources that one key needs.
    runtime_env : dict, optional
        Ray's runtime environment of the tasks and the driver, for example
        ``{"working_dir": "."}`` to send the pipeline's code along.
    **ray_options
        Any other option of Ray's tasks, for example ``scheduling_strategy``.
    """

    shows = True

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
        self._address = address
        self._runtime_env = {"runtime_env": runtime_env} if runtime_env else {}
        needs = {"num_cpus": num_cpus, "num_gpus": num_gpus, "memory": memory, "resources": resources}
        self._options = {k: v for k, v in needs.items() if v is not None} | ray_options
        self._needs = {"CPU": num_cpus, "GPU": num_gpus, "memory": memory or 0} | (resources or {})
        self._started = False
        self._tickets: dict[ray.ObjectRef[Report], int] = {}
        self._submitted = 0
        self._imports: list[ray.ObjectRef[None]] = []
        self._shown_table = ""
        self._places = 0
        self._counted_at = float("-inf")

    def __repr__(self) -> str:
        return f"RayExecutor({self._address or 'auto'})"

    def connect(self) -> None:
        if ray.is_initialized():
            return
        try:
            ray.init(self._address, log_to_driver=False, logging_level=logging.WARNING)
        except Exception as error:  # Ray raises this class itself where a node takes too long to start
            raise ClusterError(
                f"Can't join the Ray cluster at {self._address or 'RAY_ADDRESS or this machine'}: {error}. "
                "Check the address with `ray status`, or leave it out to start a cluster on this machine. "
                "If the cluster wants a token, RAY_AUTH_MODE=token must be set before Ray is imported, "
                "and the token be in ~/.ray/auth_token."
            ) from error
        self._started = True

    def drive(self, loop: Loop, watch: Watch, info: RunInfo) -> Summary:
        return outlive(self, lambda watch_all: self._drive_once(loop, watch_all, info), watch, info)

    def _drive_once(self, loop: Loop, watch: Watch, info: RunInfo) -> Summary:
        imports = self._remote(_get_ready).options(name=f"{info.table} (imports)").remote()
        host = self._host()
        ask = _line_to(host, info)
        try:
            self._imports = [imports]
            begin = host.begin.options(name=f"djdist driver of {info.table}")
            _answer(begin.remote(info, loop, self, config.lease_seconds))
            return follow(ask, watch)
        except DriverLostError:
            _hosts.clear()
            raise
        finally:
            self._imports = []
            ask("forget")

    def check_detaches(self) -> None:
        if not (self._address or ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
            super().check_detaches()

    def detach(self, loop: Loop, info: RunInfo) -> Ask:
        lasting = {"lifetime": "detached", "max_restarts": MAX_DRIVERS - 1, "max_task_retries": -1}
        name = f"run {info.id} of {info.table}"
        caller = self._actor(LastingCaller, name, **lasting).remote(info, loop, self)
        ask = _line_to(caller, info)
        ask("status")
        return ask

    def runs(self) -> list[tuple[RunInfo, Ask]]:
        named = ray.util.list_named_actors(all_namespaces=True)
        return [run for actor in named if actor["namespace"] == NAMESPACE for run in _runs_of(actor["name"])]

    def _host(self) -> Any:
        """Give this process's actor for drivers; only its first run waits for the actor to start."""
        context = ray.get_runtime_context()
        here = (context.get_node_id(), context.get_job_id(), repr(self._runtime_env))
        if here not in _hosts:
            _hosts[here] = self._actor(DriverHost, f"drivers {uuid4().hex[:8]}", max_restarts=0).remote()
        return _hosts[here]

    def _actor(self, kind: type[Any], name: str, **options: Any) -> Any:
        actor_class: Any = ray.remote(num_cpus=0, resources=HEAD_NODE)(kind)
        return actor_class.options(name=f"djdist {name}", namespace=NAMESPACE, **options, **self._runtime_env)

    def disconnect(self) -> None:
        if self._started:
            self._started = False
            _hosts.clear()
            ray.shutdown()

    def attach(self) -> None:
        self._address = ray.get_runtime_context().gcs_address

    def start(self, work: Work) -> None:
        fetch: Callable[[], Any] = partial(ray.get, ray.put(work))
        self._work = fetched(work, fetch)
        self._task = self._remote(_do)
        self._shown = self.predecessor or Status()

    def show(self, table: str, status: Status, make_seconds: Sequence[float]) -> None:
        _metrics().record(table, self._shown, status, make_seconds)
        self._shown_table, self._shown = table, status

    def places(self) -> int:
        now = time.monotonic()
        if now - self._counted_at >= PLACES_AGE_SECONDS:
            total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            fitting = (total.get(name, 0) / need for name, need in self._needs.items() if need)
            self._places = int(min(fitting, default=total.get("CPU", 0)))
            self._counted_at = now
        return self._places

    def free_places(self) -> int:
        return window(self.places()) - len(self._tickets)

    def submit(self, table: str, jobs: Sequence[Job]) -> int:
        self._submitted += 1
        name = task_name(table, jobs) if self._submitted <= NAMED_TASKS else table
        if self._imports:
            self._wait_for_imports()
        self._tickets[self._task.options(name=name).remote(self._work, tuple(jobs))] = self._submitted
        return self._submitted

    def _wait_for_imports(self) -> None:
        """Give the first task to the worker that is about to be ready, lest Ray start another one."""
        ray.wait(self._imports, timeout=IMPORTS_SECONDS, fetch_local=False)
        self._imports = []

    def wait(self, timeout_seconds: float) -> list[Completion]:
        ready, _ = ray.wait(list(self._tickets), timeout=timeout_seconds)
        if ready:
            ready, _ = ray.wait(list(self._tickets), num_returns=len(self._tickets), timeout=0)
        return [_completion(self._tickets.pop(reference), reference) for reference in ready]

    def cancel(self, ticket: int) -> bool:
        return False

    def kill(self, ticket: int) -> None:
        for reference, running in self._tickets.items():
            if running == ticket:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        for reference in self._tickets:
            ray.cancel(reference, force=True)
        self._tickets.clear()
        if self._shown_table:
            self.show(self._shown_table, replace(self._shown, running=0, queued=0, pending=0), ())

    def _remote(self, function: Callable[..., Any]) -> Any:
        once: Any = ray.remote
        return once(max_retries=0, **self._options, **self._runtime_env)(function)


class _Metrics:
    """The counts of this process's runs as Ray exports them, its prefix ``ray_`` before their names."""

    def __init__(self) -> None:
        by_table = {"tag_keys": ("table",)}
        self._finished = Counter("djdist_jobs_finished", "Keys that were made", **by_table)
        self._failed = Counter("djdist_jobs_failed", "Keys that became errors", **by_table)
        self._in_flight = Gauge("djdist_jobs_in_flight", "Keys that run or wait on the cluster", **by_table)
        self._pending = Gauge("djdist_jobs_pending", "Keys that wait in the jobs table", **by_table)
        seconds = "How long a task took for a key"
        self._seconds = Histogram("djdist_make_seconds", seconds, boundaries=BUCKET_SECONDS, **by_table)

    def record(self, table: str, before: Status, now: Status, make_seconds: Sequence[float]) -> None:
        tags = {"table": table}
        if now.made > before.made:
            self._finished.inc(now.made - before.made, tags)
        if now.failed > before.failed:
            self._failed.inc(now.failed - before.failed, tags)
        self._in_flight.set(now.running + now.queued, tags)
        self._pending.set(now.pending, tags)
        for seconds in make_seconds:
            self._seconds.observe(seconds, tags)


_metrics = cache(_Metrics)


class DriverHost:
    """Keeps the drivers of one caller's runs."""

    def __init__(self) -> None:
        _spare_imports()
        self._drivers: dict[str, tuple[RunInfo, DriverActor]] = {}

    def begin(self, info: RunInfo, loop: Loop, executor: Executor, patience_seconds: float) -> None:
        """Start the driver of a run."""
        self._drivers[info.id] = info, DriverActor(loop, executor, patience_seconds)

    def ask(self, run: str, method: str) -> Any:
        """Call a method of a run's driver."""
        return getattr(self._drivers[run][1], method)()

    def forget(self, run: str) -> None:
        """Forget a run."""
        self._drivers.pop(run, None)

    def infos(self) -> list[RunInfo]:
        """Tell which runs are here for callers of their own."""
        return [info for info, _ in self._drivers.values() if not info.detached]


class LastingCaller:
    """Stands in for the caller of a run that goes on without it, and keeps its result for a day.

    Once somebody has taken it, it is kept for an hour: who waited may have lost it.
    """

    def __init__(self, info: RunInfo, loop: Loop, executor: Executor) -> None:
        context = ray.get_runtime_context()
        if context.was_current_actor_reconstructed:
            executor.predecessor = Status(begun=True)
        self._info = info
        self._status = Status()
        self._stopping = False
        self._result: Summary | DjdistError | None = None
        self._taken = threading.Event()
        arguments = (executor, loop, context.current_actor)
        threading.Thread(target=self._drive, args=arguments, daemon=True).start()

    def ask(self, run: str, method: str) -> Any:
        """Call one of the methods that a handle knows."""
        return getattr(self, method)()

    def status(self) -> Status:
        """Tell how far the run is."""
        return self._status

    def stop(self) -> None:
        """Let the run reserve no more jobs."""
        self._stopping = True

    def result(self) -> Summary | DjdistError | None:
        """Give the run's summary, or what ended it; None while it goes on."""
        return self._result

    def infos(self) -> list[RunInfo]:
        """Tell which run it is."""
        return [self._info]

    def forget(self, run: str) -> None:
        """Note that somebody has the result."""
        self._taken.set()

    def _drive(self, executor: Executor, loop: Loop, me: Any) -> None:
        self._result = end_of(lambda: executor.drive(loop, self._watch, self._info))
        if self._taken.wait(RESULT_KEPT_SECONDS):
            time.sleep(TAKEN_RESULT_KEPT_SECONDS)
        ray.kill(me)

    def _watch(self, status: Status) -> bool:
        self._status = status
        return not self._stopping


_hosts: dict[tuple[str, str, str], Any] = {}


def _line_to(host: Any, info: RunInfo) -> Ask:
    def ask(method: str) -> Any:
        if method == "forget":
            return host.forget.remote(info.id)
        quietly = host.ask.options(enable_task_events=False)  # its page lists the keys only
        return _answer(quietly.remote(info.id, method))

    return ask


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayError as error:
        raise DriverLostError(f"The run's driver was lost on the Ray cluster: {error}") from error


def _runs_of(actor: str) -> list[tuple[RunInfo, Ask]]:
    try:
        host = ray.get_actor(actor, NAMESPACE)
        return [(info, _line_to(host, info)) for info in ray.get(host.infos.remote(), timeout=LOOK_SECONDS)]
    except (RayError, ValueError):  # it ended meanwhile, or hangs
        return []


def _get_ready() -> None:
    """Let a worker import while the driver does, which else tries it first and waits for that."""
    _spare_imports()
    import_module("djdist.worker")


def _spare_imports() -> None:
    """Let what is imported next not be held up by searches for garbage in all of Ray, half of its time."""
    gc.freeze()


def _do(work: Work, jobs: Sequence[Job]) -> Report:
    return work(jobs)


def _completion(ticket: int, reference: "ray.ObjectRef[Report]") -> Completion:
    try:
        return Completion(ticket, ray.get(reference))
    except Exception as error:
        return Completion.broken(ticket, error)
