"""Which workers a Dask cluster has, what runs on them, and how they are restarted."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import distributed

from djdist._job import Status, Watch
from djdist._needs import Node

logger = logging.getLogger(__name__)

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
HEARTBEAT_SECONDS = 2.0
"""Workers say more often what they run, unless there are hundreds."""
LOOK_SECONDS = 0.1
ABSENCE_SECONDS = 5.0
ABSENT = (
    "A key needs %s of one worker, and no worker of the Dask cluster has that: it has %s. The run waits for "
    "a worker that has it (dask worker --resources %r)."
)


class TasksOnWorker(NamedTuple):
    """The tasks that a worker has, those that it ran when last heard of, and those that have seceded."""

    assigned: list[Any]
    executing: list[Any]
    seceded: list[Any]

    def runs(self, wanted: Callable[[Any], bool]) -> bool:
        """Return whether it may run one of these tasks."""
        return not self.executing or any(map(wanted, self.executing + self.seceded))

    def is_unclear(self, wanted: Callable[[Any], bool]) -> bool:
        """Return whether it may run another one instead: of what it has begun just now nobody has heard."""
        is_shared = len({bool(wanted(key)) for key in self.assigned}) > 1
        return is_shared and not self.executing and not any(map(wanted, self.seceded))


class Workers:
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
        self._nodes: list[Node] = []
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

    def nodes(self) -> list[Node]:
        """Return the workers that may make keys, each of which makes one at a time."""
        count = self.slots()
        if count != len(self._nodes):
            self._nodes = [Node({"cpus": 1, **self._needs}, slots=1) for _ in range(count)]
        return self._nodes

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
        found, until = self._tasks(), time.monotonic() + HEARTBEAT_SECONDS
        while any(on.is_unclear(wanted) for on in found.values()) and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
            found = self._tasks()
        running = {w: set(filter(wanted, on.assigned)) for w, on in found.items() if on.runs(wanted)}
        return {worker: keys for worker, keys in running.items() if keys}

    def _tasks(self) -> "dict[str, TasksOnWorker]":
        with suppress(*LOST):
            return {w: TasksOnWorker(*on) for w, on in self.client.run_on_scheduler(_tasks_by_worker).items()}
        return {}

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


def beside_others(client: distributed.Client) -> set[str]:
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
    """Return which tasks each worker has, which of them ran when last heard of, and which have seceded.

    The last is what a make() does that waits for what it computes on the cluster.
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
