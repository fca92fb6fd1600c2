"""The tasks of one run on Ray, and what its driver opens them with."""

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
from djdist.executors.ray.nodes import Nodes
from djdist.executors.ray.workers import KeyOptions, Tasks, WarmWorkers, ready
from djdist.shipping.pickled_task import fetched

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
        nodes = Nodes()
        plain = Tasks(self.keys, sent)
        return Pool(
            nodes, plain, WarmWorkers(self.keys, sent, nodes) if self.keys.warm else plain, self.imports
        )

    def _sent(self, work: TaskFunction) -> TaskFunction:
        fetch: Callable[[], Any] = partial(ray.get, ray.put(work))
        return FindingModules(self.caller, fetched(work, fetch))


class Pool(TaskPool):
    """Gives one run's tasks to Ray and shows on its dashboard how the run stands."""

    has_dashboard = True

    def __init__(
        self,
        nodes: Nodes,
        plain: Tasks,
        on_gpus: "Tasks | WarmWorkers",
        imports: "list[ray.ObjectRef[None]]",
    ) -> None:
        self._nodes = nodes
        self._plain = plain
        self._on_gpus = on_gpus
        self._parts = list(dict.fromkeys((plain, on_gpus)))
        self._imports = imports
        self._submitted = 0
        self._shown: dict[str, Counts] = {}

    def nodes(self) -> Sequence[Node]:
        return self._nodes()

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        self._submitted += 1
        name = task_name(table, jobs) if self._submitted <= NAMED_TASKS else table
        part = self._on_gpus if needs.gpus else self._plain
        if self._imports and part is self._plain:
            self._wait_for_imports()
        part.submit(self._submitted, table, tuple(jobs), needs, name)
        return self._submitted

    def _wait_for_imports(self) -> None:
        """Send the first task to the worker that is about to be ready, or Ray would start another one."""
        ray.wait(self._imports, timeout=IMPORTS_SECONDS, fetch_local=False)
        self._imports = []

    def wait(self, timeout_seconds: float) -> list[Completion]:
        ended = ready((reference for part in self._parts for reference in part.references), timeout_seconds)
        return [completion for part in self._parts for completion in part.take(ended)]

    def cancel(self, ticket: int) -> bool:
        return any(part.cancel(ticket) for part in self._parts)

    def kill(self, ticket: int) -> None:
        for part in self._parts:
            part.kill(ticket)

    def show(self, table: str, counts: Counts, make_seconds: Sequence[float]) -> None:
        metrics().record(table, self._shown.get(table, counts), counts, make_seconds)
        self._shown[table] = counts

    def close(self) -> None:
        for part in self._parts:
            part.close()
        for table, counts in self._shown.items():
            self.show(table, replace(counts, running=0, queued=0, pending=0), ())
