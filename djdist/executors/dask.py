"""Dask: the driver as an actor on a worker, keys as tasks."""

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import cloudpickle
import dask
import distributed
from distributed.protocol.serialize import Serialize
from distributed.threadpoolexecutor import thread_state, threads_lock
from distributed.worker_state_machine import SecedeEvent

from djdist._executor import ActorCall, Executor, Loop, default_slots
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
from djdist._task_pool import TaskPool, what_is_made, window
from djdist.driver.actor import POLL_SECONDS, DriverActor, follow, result_or_error, supervise
from djdist.errors import ClusterError, DjdistError, DriverLostError, OptionError
from djdist.executors.dask_cluster import own_cluster
from djdist.shipping.pickled_task import PickledTask, fetched
from djdist.worker import give_back_and_exit, one_at_a_time

logger = logging.getLogger(__name__)

DRIVER = "djdist driver"
TASK_ID = r"[0-9a-f]{8}-[0-9a-f]{4,8}-\d+"
SLOTS_AGE_SECONDS = 1.0
RESTART_SECONDS = 30
SILENCE_SECONDS = 10.0
"""A worker that the scheduler has not heard of for this time may answer no question."""

LOST = (
    OSError,
    RuntimeError,
    distributed.CancelledError,
    distributed.KilledWorker,
    distributed.TimeoutError,
)
"""What Dask raises where a worker, a task's future or the scheduler is gone."""

KINDS: dict[type[BaseException], BreakageKind] = {
    distributed.KilledWorker: BreakageKind.WORKER_DIED,
    distributed.scheduler.NoValidWorkerError: BreakageKind.REFUSED,
}
"""Why a worker died Dask doesn't tell."""

ABSENCE_SECONDS = 5.0
ABSENT = (
    "A key needs %s of one worker, and no worker of the Dask cluster has that: it has %s. The run waits for "
    "a worker that has it (dask worker --resources %r)."
)

PATIENT_WITH_WORKERS = {"distributed.deploy.lost-worker-timeout": "10 minutes"}
"""Else a cluster on this machine drops a worker that is being restarted, 15 s after an earlier restart."""

TURN_SECONDS = 1.0
"""So long a task waits for the make() that its process is at, before it looks for another worker."""

LOOK_SECONDS = 0.1
"""As often a worker looks whether the make() that it is at waits for other tasks."""


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
        self._started = ExitStack()

    def __repr__(self) -> str:
        cluster = self._cluster or getattr(self, "_client", None)
        return f"DaskExecutor({cluster or 'auto'})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_cluster, (self._options,)

    def connect(self) -> None:
        self._client = self._joined() or self._started_client()

    def with_kill(self) -> Executor:
        client = self._joined()
        if client and (beside := _beside_others(client)):
            raise OptionError(
                f"timeout_seconds ends the process of a make() that takes too long, but {', '.join(beside)} "
                "is in the process of its client or scheduler: leave timeout_seconds out, or start workers "
                "as processes of their own, as LocalCluster(processes=True) does."
            )
        return self

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        return _Pool(_Workers(self._client, self._options), uuid4().hex[:8], tasks)

    def drive(self, loop: Loop, watch: Watch, info: RunInfo) -> Summary:
        with _slot_given_up():
            return supervise(self, partial(self._drive_once, loop, info), watch, info)

    def _drive_once(self, loop: Loop, info: RunInfo, watch: Watch, predecessor: Status | None) -> Summary:
        key = (DRIVER, info.table, uuid4().hex[:8])
        there, workers = _OnDriver(self._options, info.id), _Workers(self._client, self._options)
        if self._joined() and not self._client.nthreads():
            logger.warning("The Dask cluster has no workers now; the run of %s waits for one", info.table)
        arguments = (loop, there, config.lease_seconds, predecessor)
        submitted = self._client.submit(DriverActor, *arguments, actor=True, key=key)
        belongs_to_run = partial(_belongs_to, info.id)
        try:
            self._publish(info, submitted)
            return follow(partial(self._call_actor, submitted), workers.explaining(watch))
        except DriverLostError:
            workers.restart(workers.still_running(belongs_to_run))
            raise
        finally:
            workers.restart(workers.running(belongs_to_run))
            _withdraw(self._client, info.id)
            submitted.release()

    def check_detaches(self) -> None:
        if not (self._cluster or _default_client() or _configured_address()):
            super().check_detaches()

    def detach(self, loop: Loop, info: RunInfo) -> ActorCall:
        self._withdraw_taken()
        key = (DRIVER, info.table, info.id)
        there = _OnDriver(self._options, info.id)
        future = self._client.submit(_drive_as_task, loop, there, key=key, pure=False)
        self._publish(info, future)
        while not self._client.run_on_scheduler(
            _has_task, future.key
        ):  # else it would be gone with this process
            time.sleep(POLL_SECONDS / 10)
        return self._proxy(info, future)

    def runs(self) -> list[tuple[RunInfo, ActorCall]]:
        self._withdraw_taken()
        names = [name for name in self._client.list_datasets() if str(name).startswith(_published(""))]
        published = [self._client.get_dataset(name, None) for name in names]
        return [(info, self._proxy(info, future)) for info, future in filter(None, published)]

    def _publish(self, info: RunInfo, driver: "distributed.Future[Any]") -> None:
        self._client.publish_dataset((info, driver), name=_published(info.id), override=True)

    def _proxy(self, info: RunInfo, driver: "distributed.Future[Any]") -> ActorCall:
        mailbox = _RunMailbox(self._client, info.id, driver)

        def call(method: str) -> Any:
            if method == "forget":
                return self._client.set_metadata([*_place(info.id), "taken"], time.time())
            with _as_driver_lost():
                return getattr(mailbox, method)() if info.detached else self._call_actor(driver, method)

        return call

    def _call_actor(self, actor: "distributed.Future[Any]", method: str) -> Any:
        with _as_driver_lost(), self._client.as_current():
            return getattr(actor.result(), method)().result()

    def _withdraw_taken(self) -> None:
        """Make the scheduler forget runs whose result was fetched long ago."""
        told: dict[str, dict[str, Any]] = self._client.get_metadata(["djdist"], {})
        long_ago = time.time() - self.taken_result_kept_seconds
        for run in [run for run, place in told.items() if place.get("taken", long_ago) < long_ago]:
            _withdraw(self._client, run)

    def disconnect(self) -> None:
        self._started.close()

    def _joined(self) -> distributed.Client | None:
        """Return the client of the cluster that is there, None where one has to be started."""
        client = self._cluster or _default_client() or _configured_address()
        if isinstance(client, distributed.Client):
            return _blocking(client)
        try:
            return _client_at(client) if client else None
        except (OSError, ValueError, distributed.TimeoutError) as error:
            raise ClusterError(
                f"Can't reach the Dask scheduler at {client}: {error}. "
                "Check the address, or leave it out to start a cluster on this machine."
            ) from error

    def _started_client(self) -> distributed.Client:
        self._started.enter_context(dask.config.set(PATIENT_WITH_WORKERS))
        cluster = self._started.enter_context(own_cluster(default_slots()))
        return self._started.enter_context(closing(distributed.Client(cluster, set_as_default=False)))


class _OnDriver(Executor):
    """What a run's driver has of its executor, in the worker where it is."""

    def __init__(self, options: dict[str, Any], run: str) -> None:
        self._options = options
        self.run = run
        self._pool: _Pool | None = None

    def __repr__(self) -> str:
        return f"DaskExecutor({self.client})"

    def attach(self) -> None:
        self.client = distributed.get_client()
        self.workers = _Workers(self.client, self._options)
        worker = distributed.get_worker()
        worker.metrics["djdist"] = _counts_here  # the dashboard has a column for it on the page of workers
        worker.handlers[_fetch.__name__] = _offer
        self._worker = worker.address

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        self._pool = _Pool(self.workers, self.run, tasks, self._worker)
        return self._pool

    def abandon(self) -> None:
        _withdraw(self.client, self.run)
        self.end_left()

    def end_left(self) -> None:
        """End what the closed pool left, with this driver's own process."""
        if self._pool and self._pool.left:
            self.workers.restart({self._worker})


class _Pool(TaskPool):
    """Submits one run's tasks, which bear its name, so that those of other runs are left alone.

    Attributes
    ----------
    left : list of distributed.Future
        What went on as it was closed, because it shares a worker with the driver, which the caller ends.
    """

    has_dashboard = True

    def __init__(
        self, workers: "_Workers", run: str, tasks: Mapping[str, TaskFunction], own_worker: str = ""
    ) -> None:
        self._workers = workers
        self._client = workers.client
        self._options = workers.options
        self._run = run
        self._driver = uuid4().hex[:4]
        self._own_worker = own_worker
        self._offered: list[PickledTask] = []
        self._tasks = {table: partial(_with_plugin, self._sent(work)) for table, work in tasks.items()}
        self._tickets: dict[distributed.Future[Report], int] = {}
        self._submitted = 0
        self.left: list[distributed.Future[Report]] = []

    def _sent(self, work: TaskFunction) -> TaskFunction:
        if not self._own_worker or not isinstance(work, PickledTask):
            return work
        _offered[work.name] = work
        self._offered.append(work)
        return fetched(work, partial(_fetch, self._own_worker, work.name))

    def show(self, table: str, status: Status, make_seconds: Sequence[float]) -> None:
        _counts[self._run] = f"{table}: {status}"

    def slots(self) -> int:
        return self._workers.slots()

    def free_slots(self) -> int:
        return window(self.slots()) - len(self._tickets)

    def submit(self, table: str, jobs: Sequence[Job]) -> int:
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
        _counts.pop(self._run, None)
        if self._tickets:
            workers = self._workers.running(partial(_belongs_to, self._run))
            beside = workers.pop(self._own_worker, set())
            self.left = [future for future in self._tickets if future.key in beside]
            self._client.cancel([future for future in self._tickets if future.key not in beside])
            self._tickets.clear()
            self._workers.restart(workers)


class _Workers:
    """Which workers there are and what runs on them, as the scheduler and they say; restarts them.

    Attributes
    ----------
    client : distributed.Client
        Leads to the cluster.
    options : dict
        How tasks are submitted.
    unfit : set of str
        The addresses of those that can't make keys, as far as is known.
    """

    def __init__(self, client: distributed.Client, options: dict[str, Any]) -> None:
        self.client = client
        self.options = options
        self._needs: dict[str, float] = options.get("resources") or {}
        among = () if options.get("allow_other_workers") else options.get("workers") or ()
        self._among = [among] if isinstance(among, str) else list(among)
        self._able: set[str] = set()
        self._counted_at = float("-inf")
        self._absent_since: float | None = None
        self._explained = False
        self.unfit: set[str] = set()

    def slots(self) -> int:
        """Count the tasks that can run at the same time: one per worker that has what a key needs."""
        now = time.monotonic()
        if now - self._counted_at >= SLOTS_AGE_SECONDS:
            able = self.client.run_on_scheduler(_workers_with, self._needs, self._among)
            self._able, self._counted_at = set(able), now
        return len(self._fit())

    def explaining(self, watch: Watch) -> Watch:
        """Tell the user, while a run is watched, why none of its tasks begins."""

        def told(status: Status) -> bool:
            self._explain_absence()
            return watch(status)

        return told

    def _explain_absence(self) -> None:
        """Say once, if no worker has had what a key needs for a while, what that is and what there is."""
        if self._explained or not self._needs:
            return
        with suppress(*LOST):
            if self.slots():
                self._absent_since = None
                return
            now = time.monotonic()
            self._absent_since = self._absent_since or now
            if now - self._absent_since >= ABSENCE_SECONDS:
                self._explained = True
                there = self.client.run_on_scheduler(_resources)
                logger.warning(ABSENT, _written(self._needs), _counted(there), _written(self._needs))

    def aim(self) -> dict[str, Any]:
        """Keep a task from unfit workers, which Dask would prefer, since they are always free."""
        return {"workers": sorted(self._fit()), "allow_other_workers": True} if self.unfit else {}

    def _fit(self) -> set[str]:
        """Return the workers that may make keys; all of them, if none is left."""
        return self._able - self.unfit or self._able

    def running(self, wanted: Callable[[Any], bool]) -> dict[str, set[Any]]:
        """Find the workers that run some of these tasks, not those on which they only wait for another's."""
        found: dict[str, tuple[list[Any], list[Any], list[Any]]] = {}
        with suppress(*LOST):
            found = self.client.run_on_scheduler(_tasks_by_worker)
        wanted_by_worker = {
            worker: set(filter(wanted, assigned))
            for worker, (assigned, executing, seceded) in found.items()
            if not executing or any(map(wanted, executing + seceded))
        }
        return {worker: keys for worker, keys in wanted_by_worker.items() if keys}

    def still_running(self, wanted: Callable[[Any], bool]) -> list[str]:
        """Find the workers that still run some of these tasks, though the scheduler has forgotten them."""
        keys: dict[str, list[Any]] = {}
        with suppress(*LOST):
            alive: list[str] = self.client.run_on_scheduler(_workers_heard_of)
            keys = self.client.run(_keys_in_threads, workers=alive, on_error="ignore") if alive else {}
        return [worker for worker, running in keys.items() if any(map(wanted, running))]

    def restart(self, workers: Iterable[str]) -> None:
        """End what runs there, where a nanny can."""
        addresses = list(workers)
        if not addresses:
            return
        try:
            with suppress(KeyError):  # one has gone by itself
                self.client.restart_workers(addresses, timeout=RESTART_SECONDS, raise_for_error=False)
        except ValueError as error:
            logger.warning(
                "Workers without a nanny can't be stopped; what runs there will change nothing: %s", error
            )
        except LOST as error:
            logger.warning("The Dask cluster doesn't answer, what runs there will change nothing: %s", error)


class _RunMailbox:
    """Where the driver of a detached run, which is a task, and who looks at it leave word for each other."""

    def __init__(
        self, client: distributed.Client, run: str, driver: "distributed.Future[Any] | None" = None
    ) -> None:
        self._client = client
        self._driver = driver
        self._place = _place(run)
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


class _GiveBackPlugin(distributed.WorkerPlugin):
    """Gives back what a worker is making that is told to go."""

    name = "djdist gives back"

    def teardown(self, worker: distributed.Worker) -> None:
        give_back_and_exit(end_process=worker.nanny is not None)  # else it may be the user's own process


_counts: dict[str, str] = {}


def _counts_here(worker: distributed.Worker) -> str:
    """Return how the runs stand whose drivers are in this process."""
    return "; ".join(list(_counts.values()))


_offered: WeakValueDictionary[str, PickledTask] = WeakValueDictionary()
"""The works of this process's drivers, not scattered, for then they would be lost with their last holder."""


async def _offer(name: str) -> Serialize:
    """Hand a driver's work to a worker that asks for it."""
    return Serialize(_offered[name])


def _fetch(address: str, name: str) -> PickledTask:
    """Ask the worker of a driver for its work."""
    worker = distributed.get_worker()
    if worker.address == address:
        return _offered[name]
    ask = getattr(worker.rpc(address), _fetch.__name__)
    work: PickledTask = distributed.utils.sync(worker.loop, ask, name=name)
    return work


def _with_plugin(work: TaskFunction, jobs: Sequence[Job]) -> Report:
    worker = distributed.get_worker()
    worker.loop.add_callback(_add_plugin, worker)
    with one_at_a_time(_await_turn), _Slot(worker):
        return replace(work(jobs), place=worker.address)


def _await_turn(lock: Any) -> None:
    """Leave the slot to what the make() may have submitted that this process is at, and come back later.

    A make() that computes on its own cluster gives up its slot until the chunks are there. If
    the next task kept it, waiting, there would never be any; and another worker may be free.
    """
    distributed.secede()
    if lock.acquire(timeout=TURN_SECONDS):
        lock.release()
    raise distributed.Reschedule


class _Slot:
    """The slot of this thread's task, which others get if its make() waits for what it has submitted itself.

    ``compute()`` and ``worker_client()`` give the slot up. ``future.result()`` doesn't, which works where
    make() runs outside the cluster, and on it waits forever once all slots are taken by such tasks.
    """

    def __init__(self, worker: distributed.Worker) -> None:
        self._worker, self._key = worker, worker.get_current_task()
        self._pool: Any = worker.executors["default"]
        self._thread = threading.current_thread()
        self._began_at, self._is_over = time.monotonic(), False

    def __enter__(self) -> None:
        self._worker.loop.add_callback(self._look_later)

    def __exit__(self, *error: object) -> None:
        with threads_lock:
            self._is_over = True
            if self._thread not in self._pool._threads:
                thread_state.proceed = False  # another thread has taken its place

    def _look_later(self) -> None:
        self._worker.loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        if _awaits_results(self._worker):
            self._give_up()
        if not self._is_over:
            self._look_later()

    def _give_up(self) -> None:
        """Do what ``secede()`` does, for a thread that can't do it itself any more."""
        with threads_lock:
            if self._is_over or self._thread not in self._pool._threads:
                return
            self._pool._threads.remove(self._thread)
            self._pool._adjust_thread_count()
        seconds = time.monotonic() - self._began_at
        self._worker.handle_stimulus(
            SecedeEvent(key=self._key, compute_duration=seconds, stimulus_id=f"djdist-{time.time()}")
        )


def _awaits_results(worker: distributed.Worker) -> bool:
    """Return whether tasks have not ended that were submitted in this process, but for those of runs."""
    futures = dict(worker._client.futures) if worker._client else {}
    return any(state.status == "pending" and not _is_of_run(key) for key, state in futures.items())


def _is_of_run(key: Any) -> bool:
    return isinstance(key, tuple) and bool(key[0] == DRIVER or re.fullmatch(TASK_ID, str(key[-1])))


async def _add_plugin(worker: distributed.Worker) -> None:
    if _GiveBackPlugin.name not in worker.plugins:
        await worker.plugin_add(_GiveBackPlugin())


def _has_task(key: Any, dask_scheduler: distributed.Scheduler) -> bool:
    return key in dask_scheduler.tasks and dask_scheduler.tasks[key].run_spec is not None


def _drive_as_task(loop: Loop, executor: _OnDriver) -> None:
    """Do a detached run as a task, which Dask begins again if its worker dies, even after its end."""
    distributed.secede()
    executor.attach()
    mailbox = _RunMailbox(executor.client, executor.run)
    if mailbox.result() is not None:
        return
    predecessor, workers = mailbox.last(), executor.workers
    mailbox.begin(predecessor or Status())
    workers.restart(workers.still_running(partial(_belongs_to, executor.run)))
    mailbox.end(result_or_error(partial(loop, executor, workers.explaining(mailbox.watch), predecessor)))
    executor.end_left()


def _published(run: str) -> str:
    return f"djdist run {run}"


def _place(run: str) -> list[str]:
    return ["djdist", run]


def _withdraw(client: distributed.Client, run: str) -> None:
    """Make the scheduler forget a run."""
    with suppress(*LOST):
        client.unpublish_dataset(_published(run))
        client.set_metadata(_place(run), {})


def _belongs_to(run: str, key: Any) -> bool:
    """Return whether a task is one of a run's keys."""
    return isinstance(key, tuple) and str(key[-1]).startswith(f"{run}-")


@contextmanager
def _as_driver_lost() -> Iterator[None]:
    try:
        yield
    except LOST as error:
        raise DriverLostError(f"The run's driver was lost on the Dask cluster: {error}") from error


_clients: dict[str, distributed.Client] = {}


def _client_at(address: str) -> distributed.Client:
    """Return this process's client of a scheduler, which is kept for handles of runs and for later calls."""
    if address not in _clients or _clients[address].status != "running":
        _clients[address] = distributed.Client(address, set_as_default=False)
    return _clients[address]


def _beside_others(client: distributed.Client) -> set[str]:
    """Find the workers that are no processes of their own, in this process and in the scheduler's."""
    beside_scheduler: set[str] = client.run_on_scheduler(_workers_without_nanny)
    return (_workers_without_nanny() | beside_scheduler) & set(client.nthreads())


def _workers_without_nanny() -> set[str]:
    return {worker.address for worker in distributed.Worker._instances if worker.nanny is None}


def _workers_with(
    needs: dict[str, float], among: list[str], dask_scheduler: distributed.Scheduler
) -> list[str]:
    """Find the workers that have what a task needs; ``among`` is left out where none is known by it."""
    workers = dask_scheduler.workers.values()
    named = [w for w in workers if not {w.address, w.name, w.host}.isdisjoint(among)] or workers
    return [w.address for w in named if all(w.resources.get(name, 0) >= n for name, n in needs.items())]


def _resources(dask_scheduler: distributed.Scheduler) -> list[dict[str, float]]:
    return [dict(worker.resources) for worker in dask_scheduler.workers.values()]


def _counted(resources: list[dict[str, float]]) -> str:
    counts = Counter(_written(each) or "no resources" for each in resources)
    return ", ".join(f"{n} worker{'s' * (n > 1)} with {each}" for each, n in counts.items()) or "no workers"


def _written(resources: dict[str, float]) -> str:
    """Write resources as Dask's command line takes them."""
    return " ".join(f"{name}={amount:g}" for name, amount in resources.items())


def _tasks_by_worker(
    dask_scheduler: distributed.Scheduler,
) -> dict[str, tuple[list[Any], list[Any], list[Any]]]:
    """Return which tasks each worker has, which of them were running when it was last heard of, and which
    have seceded, such as a make() that waits for what it computes on the cluster.
    """
    return {
        worker.address: (
            [task.key for task in worker.processing],
            [task.key for task in worker.executing if task in worker.processing - worker.long_running],
            [task.key for task in worker.long_running],
        )
        for worker in dask_scheduler.workers.values()
    }


def _workers_heard_of(dask_scheduler: distributed.Scheduler) -> list[str]:
    now = time.time()
    workers = dask_scheduler.workers.values()
    return [worker.address for worker in workers if now - worker.last_seen < SILENCE_SECONDS]


def _keys_in_threads(dask_worker: distributed.Worker) -> list[Any]:
    return list(dask_worker.active_threads.values())


def _blocking(client: distributed.Client) -> distributed.Client:
    if client._asynchronous:
        raise OptionError(
            f"{client!r} is asynchronous, and populate() waits for its answers: make a client without "
            "asynchronous=True, or give the scheduler's address, executor=djdist.DaskExecutor(address)."
        )
    return client


def _default_client() -> distributed.Client | None:
    """Return the client of this process or, in a task, that of the cluster that runs it."""
    for find in (distributed.default_client, _client_of_task):
        with suppress(ValueError):
            found: distributed.Client = find()
            return found
    return None


def _client_of_task() -> distributed.Client:
    distributed.get_worker()
    return distributed.get_client()


@contextmanager
def _slot_given_up() -> Iterator[None]:
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


def _configured_address() -> str | None:
    address: str | None = dask.config.get("scheduler-address", None)
    return address


def _without_cluster(options: dict[str, Any]) -> DaskExecutor:
    return DaskExecutor(**options)


def _completion(ticket: int, future: "distributed.Future[Report]") -> Completion:
    try:
        return Completion(ticket, future.result())
    except Exception as error:
        return Completion(ticket, error=Breakage.of(error, KINDS))
