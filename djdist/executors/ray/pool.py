"""The tasks of one run on Ray, and what its driver opens them with."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray

from djdist._executor import Executor
from djdist._job import Completion, Counts, Job, TaskFunction
from djdist._needs import Needs, Node
from djdist._task_pool import TaskPool, task_name
from djdist.executors.ray.connection import gcs_address
from djdist.executors.ray.metrics import metrics
from djdist.executors.ray.modules import Caller, FindingModules
from djdist.executors.ray.slots import Nodes
from djdist.executors.ray.workers import KeyOptions, Tasks, WarmWorkers
from djdist.shipping.pickled_task import fetched

logger = logging.getLogger(__name__)

IMPORTS_SECONDS = 3.0
NAMED_TASKS = 1000
"""Ray's processes keep metrics for every name of a task, so that later ones have the table's only."""


@dataclass
class OnDriver(Executor):
    """What a run's driver has of its executor."""

    keys: KeyOptions
    caller: Caller
    imports: list[ray.ObjectRef[None]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"RayExecutor({gcs_address()})"

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        sent = {table: self._sent(work) for table, work in tasks.items()}
        if self.keys.warm:
            logger.info("Each GPU slot keeps its process, and what that has loaded, until the run ends")
        workers = WarmWorkers if self.keys.warm else Tasks
        return Pool(workers(self.keys, sent), self.imports)

    def _sent(self, work: TaskFunction) -> TaskFunction:
        fetch: Callable[[], Any] = partial(ray.get, ray.put(work))
        return FindingModules(self.caller, fetched(work, fetch))


class Pool(TaskPool):
    """Gives one run's tasks to Ray and shows on its dashboard how the run stands."""

    has_dashboard = True

    def __init__(
        self,
        workers: Tasks | WarmWorkers,
        imports: "list[ray.ObjectRef[None]]",
    ) -> None:
        self._workers = workers
        self._nodes = Nodes()
        self._imports = imports
        self._submitted = 0
        self._shown: dict[str, Counts] = {}

    def nodes(self) -> Sequence[Node]:
        return self._nodes.seen()

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
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

    def show(self, table: str, counts: Counts, make_seconds: Sequence[float]) -> None:
        metrics().record(table, self._shown.get(table, counts), counts, make_seconds)
        self._shown[table] = counts

    def close(self) -> None:
        self._workers.close()
        for table, counts in self._shown.items():
            self.show(table, replace(counts, running=0, queued=0, pending=0), ())
