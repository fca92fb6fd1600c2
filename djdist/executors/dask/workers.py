"""Which workers a Dask cluster has, what runs on them, and how they are restarted."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import distributed

from djdist._needs import Node
from djdist.executors.dask.worker_side import is_of_run

logger = logging.getLogger(__name__)

NODES_AGE_SECONDS = 1.0
UNLIMITED_BYTES = 2**63
GPU = "GPU"
"""The resource of workers that stands for it."""
OVER_MEMORY_LIMIT = "worker-restart-memory"
"""Where nannies tell which workers they have ended."""
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
    restarting : dict of str to Node
        Those that are restarted beside the run, which count as there.
    """

    def __init__(self, client: distributed.Client, options: dict[str, Any]) -> None:
        self.client = client
        self.options = options
        among = () if options.get("allow_other_workers") else options.get("workers") or ()
        self._among = [among] if isinstance(among, str) else list(among)
        self._there: dict[str, Node] = {}
        self._able: set[str] = set()
        self._asked_at = float("-inf")
        self._nodes: tuple[Node, ...] = ()
        self._looking = threading.Lock()
        self.unfit: set[str] = set()
        self.restarting: dict[str, Node] = {}

    def nodes(self) -> Sequence[Node]:
        """Return what each worker has; it makes one key at a time."""
        coming = list(self.restarting.values())  # first: better counted twice for a moment than missing
        nodes = (*self.fit().values(), *coming)
        self._nodes = self._nodes if nodes == self._nodes else nodes
        return self._nodes

    def fit(self) -> dict[str, Node]:
        """Return the workers that may make keys, asked for at most once per second; all, if none is left."""
        self._look()
        able = (self._able - self.unfit or self._able) - self.restarting.keys()
        return {address: self._there[address] for address in sorted(able)}

    def _look(self) -> None:
        with self._looking:
            now = time.monotonic()
            if now - self._asked_at >= NODES_AGE_SECONDS:
                there, self._able = self.client.run_on_scheduler(_workers_there, self._among)
                self._there = {address: _node(*has) for address, has in there.items()}
                self._asked_at = now

    def are_gone(self, addresses: Iterable[str]) -> set[str]:
        """Return which of some workers are not there any more."""
        self._look()
        return set(addresses) - self._there.keys()

    def aim(self) -> dict[str, Any]:
        """Keep a task from unfit workers, which Dask would prefer, since they are always free."""
        is_free = self.unfit and "workers" not in self.options
        return {"workers": list(self.fit()), "allow_other_workers": True} if is_free else {}

    def has_restarted_for_memory(self, address: str) -> bool:
        """Return whether its nanny has ended a worker over its limit of memory."""
        with suppress(*LOST):
            events = self.client.get_events(OVER_MEMORY_LIMIT)
            return any(event["worker"] == address for _, event in events)
        return False

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

    def can_be_restarted(self, address: str) -> bool:
        """Return whether a worker has a nanny and nothing that is missed: tasks, actors, others' results."""
        with suppress(*LOST):
            return bool(self.client.run_on_scheduler(_is_missed_by_nobody, address))
        return False

    def restart_beside(self, address: str) -> None:
        """Restart a worker while the run goes on; it comes back with nothing loaded."""
        self.restarting[address] = self._there[address]

        def restart() -> None:
            self.restart([address])
            with self._looking:  # what was asked before may still name it
                self._asked_at = float("-inf")
                del self.restarting[address]

        threading.Thread(target=restart, daemon=True).start()

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


def _workers_there(
    among: list[str], dask_scheduler: distributed.Scheduler
) -> tuple[dict[str, tuple[int, int, dict[str, float]]], set[str]]:
    """Return what workers have, and which are among some; all, where none is known by those names."""
    workers = dask_scheduler.workers.values()
    named = {w.address for w in workers if not {w.address, w.name, w.host}.isdisjoint(among)}
    there = {w.address: (w.nthreads, w.memory_limit, dict(w.resources)) for w in workers}
    return there, named or set(there)


def _node(threads: int, memory_limit: int, resources: dict[str, float]) -> Node:
    own = {"cpus": threads, "memory": memory_limit or UNLIMITED_BYTES}
    return Node(own | {"gpus" if name == GPU else name: n for name, n in resources.items()}, slots=1)


def _is_missed_by_nobody(address: str, dask_scheduler: distributed.Scheduler) -> bool:
    worker = dask_scheduler.workers.get(address)
    if worker is None or worker.nanny is None or worker.processing or worker.actors:
        return False
    return all(is_of_run(task.key) for task in worker.has_what)  # a run doesn't need what it has been told


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
