"""Ray: the driver as an actor on the head node, keys as remote tasks."""

import gc
import logging
import os
import platform
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray import exceptions
from ray.exceptions import RayError
from ray.util import metrics

from djdist._executor import ActorCall, Executor, Loop
from djdist._job import (
    Breakage,
    BreakageKind,
    Completion,
    Job,
    Report,
    RunInfo,
    Status,
    Summary,
    TaskFunction,
    Watch,
)
from djdist._settings import config
from djdist._task_pool import TaskPool, task_name, window
from djdist.driver.actor import MAX_DRIVERS, DriverActor, follow, result_or_error, supervise
from djdist.errors import ClusterError, DjdistError, DriverLostError, OptionError
from djdist.shipping.pickled_task import fetched

logger = logging.getLogger(__name__)

SLOTS_AGE_SECONDS = 1.0
NAMESPACE = "djdist"
LOOK_SECONDS = 5.0
IMPORTS_SECONDS = 3.0
NAMED_TASKS = 1000
"""Ray's processes keep metrics for every name of a task, so that later ones have the table's only."""
RESULT_KEPT_SECONDS = 24 * 3600.0
BUCKET_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0]
HEAD_NODE = {"node:__internal_head__": 0.001}
IDLE_SECONDS = 10.0
UNMET_SECONDS = 10.0
ROUNDING = 1e-6
PORT_SECONDS = 5.0
TOO_SLOW = "timed out during startup"
CLIENT_PORT = 10001
SENT_ALONG = ("working_dir", "py_modules", "excludes", "java_jars")
"""Parts of a runtime environment that Ray sends from here only as it connects."""


KINDS: dict[type[BaseException], BreakageKind] = {
    exceptions.OutOfMemoryError: BreakageKind.OUT_OF_MEMORY,
    exceptions.NodeDiedError: BreakageKind.NODE_LOST,
    exceptions.ActorDiedError: BreakageKind.WORKER_DIED,
    exceptions.WorkerCrashedError: BreakageKind.WORKER_DIED,
    exceptions.ActorUnschedulableError: BreakageKind.REFUSED,
    exceptions.RuntimeEnvSetupError: BreakageKind.REFUSED,
    exceptions.TaskUnschedulableError: BreakageKind.REFUSED,
}


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
        self._address = address
        self._sent_along = {p: v for p, v in (runtime_env or {}).items() if _is_sent_along(p, v)}
        by_task = {p: v for p, v in (runtime_env or {}).items() if p not in self._sent_along}
        self._runtime_env = {"runtime_env": by_task} if by_task else {}
        given = {"num_cpus": num_cpus, "num_gpus": num_gpus, "memory": memory, "resources": resources}
        needs = {"CPU": num_cpus, "GPU": num_gpus, "memory": memory or 0} | (resources or {})
        options = {k: v for k, v in given.items() if v is not None} | ray_options | self._runtime_env
        self._keys = _KeyOptions(needs, options, warm=num_gpus > 0 and "max_calls" not in ray_options)
        self._caller = _Caller()
        self._joined: _Joined | None = None

    def __repr__(self) -> str:
        return f"RayExecutor({self._address or 'auto'})"

    def connect(self) -> None:
        with _connecting:  # Ray fails where two threads join at once
            self._caller = _Caller.here()
            if not ray.is_initialized():
                self._join()
            else:
                self._check_connection()
            self._joined = _joined_here()
            if self._joined:
                self._joined.calls += 1

    def _join(self) -> None:
        try:
            address = self._address or os.environ.get("RAY_ADDRESS")
            _knock(address or "")
            _ask_for_token(address)
            sent_along: Any = {"runtime_env": self._sent_along} if self._sent_along else {}
            _init(address, log_to_driver=False, logging_level=logging.WARNING, **sent_along)
            _hide_token()
        except Exception as error:  # Ray raises this class itself where a node takes too long to start
            raise ClusterError(
                f"Can't join the Ray cluster at {self._address or 'RAY_ADDRESS or this machine'}: {error}. "
                "Check the address with `ray status`, or leave it out to start a cluster on this machine. "
                "If the cluster wants a token, RAY_AUTH_MODE=token must be set before Ray is imported, "
                "and the token be in ~/.ray/auth_token."
            ) from error
        _connections[:] = [_Joined(self._address, self._sent_along, _job())]

    def _check_connection(self) -> None:
        """Check that this process is connected to the cluster that was asked for."""
        joined = _joined_here()
        if self._address not in (None, "auto", joined and joined.address) and not _leads_here(self._address):
            raise OptionError(
                f"This process is connected to the Ray cluster at {_gcs_address()}, not through "
                f"{self._address}: leave the address out to use that one, or call ray.shutdown() first."
            )
        if self._sent_along and not (joined and joined.sent_along == self._sent_along):
            raise OptionError(
                f"This process is connected to Ray already, and Ray sends {', '.join(self._sent_along)} "
                f"only when it connects: write ray.init(…, runtime_env={self._sent_along!r}) there, "
                "and leave it out of RayExecutor; or let RayExecutor connect, before anything else does."
            )

    def drive(self, loop: Loop, watch: Watch, info: RunInfo) -> Summary:
        return self.drive_on(loop, watch, info, None)

    def drive_on(self, loop: Loop, watch: Watch, info: RunInfo, predecessor: Status | None) -> Summary:
        """Follow a run on the cluster to its end, which a lost driver may have begun."""
        follow_one = partial(self._drive_once, loop, info)
        return supervise(self, follow_one, watch, info, predecessor)

    def _drive_once(self, loop: Loop, info: RunInfo, watch: Watch, predecessor: Status | None) -> Summary:
        imports = self._keys.remote(_get_ready, max_retries=0).options(name=f"{info.table} (imports)")
        there = _OnDriver(self._keys, self._caller, [] if self._keys.warm else [imports.remote()])
        host = self._host()
        call = _proxy(host, info)
        try:
            begin = host.begin.options(name=f"djdist driver of {info.table}")
            _answer(begin.remote(info, loop, there, config.lease_seconds, predecessor))
            return follow(call, _WarningOfUnmetNeeds(self._keys.needs, watch, info.table))
        except DriverLostError:
            _forget_host(host)
            raise
        finally:
            call("forget")

    def check_detaches(self) -> None:
        if not (self._address or ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
            super().check_detaches()

    def detach(self, loop: Loop, info: RunInfo) -> ActorCall:
        lasting = {"lifetime": "detached", "max_restarts": MAX_DRIVERS - 1, "max_task_retries": -1}
        name = f"run {info.id} of {info.table}"
        caller = self._actor(DetachedRun, name, **lasting).remote(info, loop, self)
        call = _proxy(caller, info)
        call("status")
        return call

    def runs(self) -> list[tuple[RunInfo, ActorCall]]:
        named = ray.util.list_named_actors(all_namespaces=True)
        return [run for actor in named if actor["namespace"] == NAMESPACE for run in _runs_of(actor["name"])]

    def _host(self) -> Any:
        """Return this process's actor for drivers; only its first run waits for the actor to start."""
        context = ray.get_runtime_context()
        here = (context.get_node_id(), context.get_job_id(), repr(self._runtime_env))
        with _connecting:  # runs that begin at the same time share one
            if here not in _hosts:
                name = f"drivers {uuid4().hex[:8]}"
                _hosts[here] = self._actor(DriverHost, name, max_restarts=0).remote()
            return _hosts[here]

    def _actor(self, kind: type[Any], name: str, **options: Any) -> Any:
        actor_class: Any = ray.remote(num_cpus=0, resources=HEAD_NODE)(kind)
        return actor_class.options(name=f"djdist {name}", namespace=NAMESPACE, **options, **self._runtime_env)

    def disconnect(self) -> None:
        with _connecting:
            joined, self._joined = self._joined, None
            if joined:
                joined.calls -= 1
            if joined and not joined.calls and joined is _joined_here():
                _hosts.clear()
                ray.shutdown()

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        return _OnDriver(self._keys, self._caller).open(tasks)


@dataclass(frozen=True)
class _KeyOptions:
    """How Ray runs keys.

    ``warm`` ones stay in their process, and the process keeps its GPU, from one key to the next.
    """

    needs: dict[str, float]
    options: dict[str, Any]
    warm: bool

    def remote(self, what: Callable[..., Any], **options: Any) -> Any:
        """Turn a function or a class into what runs with a key's needs."""
        remote: Any = ray.remote
        return remote(**options, **self.options)(what)


@dataclass
class _OnDriver(Executor):
    """What a run's driver has of its executor."""

    keys: _KeyOptions
    caller: "_Caller"
    imports: list[ray.ObjectRef[None]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"RayExecutor({_gcs_address()})"

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        sent = {table: self._sent(work) for table, work in tasks.items()}
        if self.keys.warm:
            logger.info("Each GPU slot keeps its process, and what that has loaded, until the run ends")
        workers = _WarmWorkers if self.keys.warm else _Tasks
        return _Pool(workers(self.keys, sent), self.keys.needs, self.imports)

    def _sent(self, work: TaskFunction) -> TaskFunction:
        fetch: Callable[[], Any] = partial(ray.get, ray.put(work))
        return _FindingModules(self.caller, fetched(work, fetch))


class _Pool(TaskPool):
    """Gives one run's tasks to Ray and shows on its dashboard how the run stands."""

    has_dashboard = True

    def __init__(
        self,
        workers: "_Tasks | _WarmWorkers",
        needs: dict[str, float],
        imports: "list[ray.ObjectRef[None]]",
    ) -> None:
        self._workers = workers
        self._slots = _Slots(needs)
        self._imports = imports
        self._submitted = 0
        self._shown: dict[str, Status] = {}

    def slots(self) -> int:
        return self._slots.count()

    def free_slots(self) -> int:
        return window(self.slots()) - len(self._workers)

    def submit(self, table: str, jobs: Sequence[Job]) -> int:
        self._submitted += 1
        name = task_name(table, jobs) if self._submitted <= NAMED_TASKS else table
        if self._imports:
            self._wait_for_imports()
        self._workers.submit(self._submitted, table, tuple(jobs), name)
        return self._submitted

    def _wait_for_imports(self) -> None:
        """Send the first task to the worker that is about to be ready, or Ray would start another one."""
        ray.wait(self._imports, timeout=IMPORTS_SECONDS, fetch_local=False)
        self._imports = []

    def wait(self, timeout_seconds: float) -> list[Completion]:
        return self._workers.wait(timeout_seconds)

    def cancel(self, ticket: int) -> bool:
        return self._workers.cancel(ticket)

    def kill(self, ticket: int) -> None:
        self._workers.kill(ticket)

    def show(self, table: str, status: Status, make_seconds: Sequence[float]) -> None:
        _metrics().record(table, self._shown.get(table, status), status, make_seconds)
        self._shown[table] = status

    def close(self) -> None:
        self._workers.close()
        for table, status in self._shown.items():
            self.show(table, replace(status, running=0, queued=0, pending=0), ())


class _Slots:
    """Counts the tasks that can run at the same time, node by node, at most once per second."""

    def __init__(self, needs: dict[str, float]) -> None:
        self.needs = {name: need for name, need in needs.items() if need}
        self.nodes: list[dict[str, float]] = []
        self._count = 0
        self._counted_at = float("-inf")

    def count(self) -> int:
        now = time.monotonic()
        if now - self._counted_at >= SLOTS_AGE_SECONDS:
            self.nodes = [node["Resources"] for node in _nodes() if node["Alive"]]
            self._count = sum(map(self._on, self.nodes))
            self._counted_at = now
        return self._count

    def _on(self, node: dict[str, float]) -> int:
        fitting = [node.get(name, 0) / need for name, need in self.needs.items()]
        return int(min(fitting, default=node.get("CPU", 0)) + ROUNDING)


class _WarningOfUnmetNeeds:
    """Lets a watching caller say once if for some seconds no node can hold a key, for Ray says nothing."""

    def __init__(self, needs: dict[str, float], watch: Watch, table: str) -> None:
        self._slots = _Slots(needs)
        self._watch = watch
        self._table = table
        self._held_at = time.monotonic()
        self._told = False

    def __call__(self, status: Status) -> bool:
        with suppress(Exception):  # the cluster's head may be away
            self._held_at = time.monotonic() if self._slots.count() else self._held_at
        if not self._told and time.monotonic() - self._held_at > UNMET_SECONDS:
            self._told = True
            self._warn()
        return self._watch(status)

    def _warn(self) -> None:
        needs = self._slots.needs
        kinds = Counter(_amounts({name: node.get(name, 0) for name in needs}) for node in self._slots.nodes)
        logger.warning(
            "A key of %s needs %s, which no node of the Ray cluster has: there are %s. "
            "The run waits for a node that has it.",
            self._table,
            _amounts(needs),
            "; ".join(f"{count} with {amounts}" for amounts, count in kinds.items()) or "none",
        )


class _Tasks:
    """Runs groups of jobs as Ray's own tasks."""

    def __init__(self, keys: _KeyOptions, works: Mapping[str, TaskFunction]) -> None:
        self._task = keys.remote(_do, max_retries=0)
        self._works = works
        self._tickets: dict[ray.ObjectRef[Report], int] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def submit(self, ticket: int, table: str, jobs: tuple[Job, ...], name: str) -> None:
        self._tickets[self._task.options(name=name).remote(self._works[table], jobs)] = ticket

    def wait(self, timeout_seconds: float) -> list[Completion]:
        ready = _ready(self._tickets, timeout_seconds)
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


class WarmWorker:
    """A process that keeps its GPU, and what it has loaded, from one group of jobs to the next."""

    def get_ready(self) -> None:
        """Import what all jobs need."""
        _get_ready()

    def do(self, work: TaskFunction, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs."""
        return _do(work, jobs)


class _WarmWorkers:
    """Runs groups of jobs in actors, which end with the run, also where its driver is killed.

    Ray ends the process of a GPU task with the task, because the next one may be given another GPU,
    which a process that has loaded CUDA doesn't notice. An actor has the same one to its end.
    """

    def __init__(self, keys: _KeyOptions, works: Mapping[str, TaskFunction]) -> None:
        self._actor = keys.remote(WarmWorker)
        self._works = works
        self._waiting: dict[int, tuple[str, tuple[Job, ...], str]] = {}
        self._starting: dict[ray.ObjectRef[None], Any] = {}
        self._busy: dict[ray.ObjectRef[Report], tuple[int, Any]] = {}
        self._idle: list[tuple[float, Any]] = []
        self._short_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._busy)

    def submit(self, ticket: int, table: str, jobs: tuple[Job, ...], name: str) -> None:
        self._waiting[ticket] = table, jobs, name
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._idle:
            ticket = next(iter(self._waiting))
            table, jobs, name = self._waiting.pop(ticket)
            _, actor = self._idle.pop()  # the one that was busy last, so that others may be let go
            self._busy[actor.do.options(name=name).remote(self._works[table], jobs)] = ticket, actor
        while len(self._starting) < len(self._waiting):
            actor = self._actor.remote()
            self._starting[actor.get_ready.remote()] = actor

    def wait(self, timeout_seconds: float) -> list[Completion]:
        ready = _ready([*self._busy, *self._starting], timeout_seconds)
        ended = [
            self._end(reference) if reference in self._busy else self._begin(reference) for reference in ready
        ]
        self._hand_out()
        self._let_go()
        return [completion for completion in ended if completion]

    def _begin(self, reference: "ray.ObjectRef[None]") -> Completion | None:
        actor = self._starting.pop(reference)
        try:
            ray.get(reference)
        except Exception as error:
            return self._refused_longest(error) if self._waiting else None
        self._idle.append((time.monotonic(), actor))
        return None

    def _refused_longest(self, error: Exception) -> Completion:
        ticket = next(iter(self._waiting))
        del self._waiting[ticket]
        return Completion(ticket, error=Breakage.of(error, KINDS))

    def _end(self, reference: "ray.ObjectRef[Report]") -> Completion:
        ticket, actor = self._busy.pop(reference)
        completion = _completion(ticket, reference)
        if completion.report:
            self._idle.append((time.monotonic(), actor))
        else:
            ray.kill(actor)
        return completion

    def _let_go(self) -> None:
        """End what has had no work for some seconds, so that others get its GPU."""
        now = time.monotonic()
        if self._waiting:
            self._short_at = now
        elif now - self._short_at > IDLE_SECONDS:
            _end_all(self._starting.values())
            self._starting.clear()
        _end_all([actor for since, actor in self._idle if now - since > IDLE_SECONDS])
        self._idle = [(since, actor) for since, actor in self._idle if now - since <= IDLE_SECONDS]

    def cancel(self, ticket: int) -> bool:
        return self._waiting.pop(ticket, None) is not None

    def kill(self, ticket: int) -> None:
        self.cancel(ticket)
        _end_all([actor for running, actor in self._busy.values() if running == ticket])

    def close(self) -> None:
        busy = [actor for _, actor in self._busy.values()]
        _end_all([*busy, *self._starting.values(), *(actor for _, actor in self._idle)])
        for part in (self._waiting, self._starting, self._busy, self._idle):
            part.clear()


def _end_all(actors: Iterable[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


@dataclass(frozen=True)
class _Caller:
    """The Python of who calls, and where it looks for modules."""

    host: str = ""
    prefix: str = ""
    paths: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> "_Caller":
        return cls(platform.node(), sys.prefix, tuple(path or os.getcwd() for path in sys.path))


@dataclass(frozen=True)
class _FindingModules:
    """A task function whose modules are looked for as at the caller, where that runs on the same machine.

    Ray lets workers look first into the caller's current folder, where Python itself doesn't look, and not at
    all where the caller has appended a path. What a runtime environment sends along comes first.
    """

    caller: _Caller
    work: TaskFunction

    def __call__(self, jobs: Sequence[Job]) -> Report:
        here, given = _Caller.here(), ray.get_runtime_context().runtime_env
        is_same_python = (here.host, here.prefix) == (self.caller.host, self.caller.prefix)
        if is_same_python and not any(map(given.get, SENT_ALONG)):
            sys.path[:] = [*self.caller.paths, *(path for path in sys.path if path not in self.caller.paths)]
        return self.work(jobs)


@dataclass
class _Joined:
    """A connection to Ray that djdist made, which ends with the last of the calls that use it."""

    address: str | None
    sent_along: dict[str, Any]
    job: str
    calls: int = 0


_connections: list[_Joined] = []
_connecting = threading.RLock()


def _joined_here() -> _Joined | None:
    """Return the connection of this process, if djdist made it."""
    return next((joined for joined in _connections if joined.job == _job()), None)


def _job() -> str:
    job: str = ray.get_runtime_context().get_job_id() if ray.is_initialized() else ""
    return job


def _gcs_address() -> str:
    address: str = ray.get_runtime_context().gcs_address
    return address


def _nodes() -> list[dict[str, Any]]:
    return ray.nodes()  # type: ignore[no-any-return, no-untyped-call]


def _is_sent_along(part: str, value: Any) -> bool:
    """Return whether a part of a runtime environment is on this machine, and not at a URI."""
    values = value if isinstance(value, list) else [value]
    return part in SENT_ALONG and not all("://" in str(value) for value in values)


def _knock(address: str) -> None:
    """Check that something listens there: Ray itself tries for a minute and a half, and fills the log."""
    if found := _host_and_port(address):
        socket.create_connection(found, timeout=PORT_SECONDS).close()


def _host_and_port(address: str) -> tuple[str, int] | None:
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme not in ("", "ray") or not (port.isdigit() or scheme):
        return None
    return (host.strip("[]"), int(port)) if port.isdigit() else (place, CLIENT_PORT)


def _ask_for_token(address: str | None) -> None:
    """Make a cluster that starts here ask for a token, as Ray does by itself from 2.59 on.

    Without a token each account of the machine could run code in it.
    """
    if _version() >= (2, 59) or "RAY_AUTH_MODE" in os.environ or address not in (None, "local"):
        return
    found = ray._private.services.canonicalize_bootstrap_address(address)  # type: ignore[arg-type]
    if not found:
        os.environ["RAY_AUTH_MODE"] = "token"
        ray._raylet.Config.initialize("")  # type: ignore[attr-defined]


def _version() -> tuple[int, ...]:
    return tuple(map(int, ray.__version__.split(".")[:2]))


def _init(address: str | None, **options: Any) -> None:
    """Join a cluster or start one, once more where it starts too slowly, as from a disk that is cold."""
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray has no class of its own for it
        if TOO_SLOW not in str(error):
            raise
        logger.warning("Ray took longer to start than it waits for that, so it is started once more")
        ray.shutdown()
        ray.init(address, **options)


def _hide_token() -> None:
    """Make the token unreadable for others: Ray writes it as the umask has it."""
    with suppress(OSError):
        (Path.home() / ".ray" / "auth_token").chmod(0o600)


def _leads_here(address: str) -> bool:
    """Return whether an address is that of the cluster to which this process is connected."""
    client = ray.util.client.ray.get_context().client_worker  # type: ignore[no-untyped-call]
    ours = f"ray://{client._conn_str}" if client and "://" in address else _gcs_address()
    return ("://" in address) == ("://" in ours) and _resolved(address) == _resolved(ours)


def _resolved(address: str) -> tuple[str, int] | None:
    host, port = _host_and_port(address) or ("", 0)
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    with suppress(OSError):
        found = socket.gethostbyname(host)
        return here if found.startswith("127.") else found, port
    return None


class _Metrics:
    """The counts of this process's runs as Ray exports them, its prefix ``ray_`` before their names."""

    def __init__(self) -> None:
        by_table = {"tag_keys": ("table",)}
        self._finished = metrics.Counter("djdist_jobs_finished", "Keys that were made", **by_table)
        self._failed = metrics.Counter("djdist_jobs_failed", "Keys that became errors", **by_table)
        self._in_flight = metrics.Gauge(
            "djdist_jobs_in_flight", "Keys that run or wait on the cluster", **by_table
        )
        self._pending = metrics.Gauge("djdist_jobs_pending", "Keys that wait in the jobs table", **by_table)
        seconds = "How long a task took for a key"
        self._seconds = metrics.Histogram(
            "djdist_make_seconds", seconds, boundaries=BUCKET_SECONDS, **by_table
        )

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

    def __init__(self, info: RunInfo, loop: Loop, executor: RayExecutor) -> None:
        context = ray.get_runtime_context()
        self._predecessor = Status(begun=True) if context.was_current_actor_reconstructed else None
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
        """Return the run's progress."""
        return self._status

    def stop(self) -> None:
        """Stop the run: it reserves no more jobs."""
        self._stopping = True

    def result(self) -> Summary | DjdistError | None:
        """Return the run's summary, or what ended it; None while it goes on."""
        return self._result

    def infos(self) -> list[RunInfo]:
        """Return which run it is."""
        return [self._info]

    def forget(self, run: str) -> None:
        """Note that somebody has the result."""
        self._taken.set()

    def _drive(self, executor: RayExecutor, loop: Loop, me: Any) -> None:
        drive = partial(executor.drive_on, loop, self._watch, self._info, self._predecessor)
        self._result = result_or_error(drive)
        if self._taken.wait(RESULT_KEPT_SECONDS):
            time.sleep(executor.taken_result_kept_seconds)
        ray.kill(me)

    def _watch(self, status: Status) -> bool:
        self._status = status
        return not self._stopping


_hosts: dict[tuple[str, str, str], Any] = {}


def _forget_host(lost: Any) -> None:
    with _connecting:
        for here in [here for here, host in _hosts.items() if host is lost]:
            del _hosts[here]


def _proxy(host: Any, info: RunInfo) -> ActorCall:
    def call(method: str) -> Any:
        if method == "forget":
            return host.forget.remote(info.id)
        quietly = host.ask.options(enable_task_events=False)  # its page lists the keys only
        return _answer(quietly.remote(info.id, method))

    return call


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayError as error:
        raise DriverLostError(f"The run's driver was lost on the Ray cluster: {error}") from error


def _runs_of(actor: str) -> list[tuple[RunInfo, ActorCall]]:
    try:
        host = ray.get_actor(actor, NAMESPACE)
        return [(info, _proxy(host, info)) for info in ray.get(host.infos.remote(), timeout=LOOK_SECONDS)]
    except (RayError, ValueError):  # it has ended, or hangs
        return []


def _get_ready() -> None:
    """Import in a worker while the driver does, so that its first task needn't wait for that."""
    _spare_imports()
    import_module("djdist.worker")


def _spare_imports() -> None:
    """Exempt what is loaded from garbage collection, which would take half of the time of further imports."""
    gc.freeze()


def _do(work: TaskFunction, jobs: Sequence[Job]) -> Report:
    return work(jobs)


def _ready(references: Iterable[Any], timeout_seconds: float) -> list[Any]:
    """Wait until one is ready, and return all that are."""
    waited_for = list(references)
    ready, _ = ray.wait(waited_for, timeout=timeout_seconds)
    return ray.wait(waited_for, num_returns=len(waited_for), timeout=0)[0] if ready else []


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(
        f"{amount / 1e9:.3g} GB memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in resources.items()
    )


def _completion(ticket: int, reference: "ray.ObjectRef[Report]") -> Completion:
    try:
        return Completion(ticket, ray.get(reference))
    except Exception as error:
        return Completion(ticket, error=Breakage.of(error, KINDS))
