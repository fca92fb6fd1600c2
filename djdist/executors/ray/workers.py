"""What makes keys: Ray's own tasks, or actors that keep their process and its GPU."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import ray
from ray import exceptions

from djdist._job import Breakage, BreakageKind, Completion, Job, Report, TaskFunction

IDLE_SECONDS = 10.0
KINDS: dict[type[BaseException], BreakageKind] = {
    exceptions.OutOfMemoryError: BreakageKind.OUT_OF_MEMORY,
    exceptions.NodeDiedError: BreakageKind.NODE_LOST,
    exceptions.ActorDiedError: BreakageKind.WORKER_DIED,
    exceptions.WorkerCrashedError: BreakageKind.WORKER_DIED,
    exceptions.ActorUnschedulableError: BreakageKind.REFUSED,
    exceptions.RuntimeEnvSetupError: BreakageKind.REFUSED,
    exceptions.TaskUnschedulableError: BreakageKind.REFUSED,
}


@dataclass(frozen=True)
class KeyOptions:
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


class Tasks:
    """Runs groups of jobs as Ray's own tasks."""

    def __init__(self, keys: KeyOptions, works: Mapping[str, TaskFunction]) -> None:
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
        get_ready()

    def do(self, work: TaskFunction, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs."""
        return _do(work, jobs)


class WarmWorkers:
    """Runs groups of jobs in actors, which end with the run, also where its driver is killed.

    Ray ends the process of a GPU task with the task, because the next one may be given another GPU,
    which a process that has loaded CUDA doesn't notice. An actor has the same one to its end.
    """

    def __init__(self, keys: KeyOptions, works: Mapping[str, TaskFunction]) -> None:
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


def _do(work: TaskFunction, jobs: Sequence[Job]) -> Report:
    return work(jobs)


def _ready(references: Iterable[Any], timeout_seconds: float) -> list[Any]:
    """Wait until one is ready, and return all that are."""
    waited_for = list(references)
    ready, _ = ray.wait(waited_for, timeout=timeout_seconds)
    return ray.wait(waited_for, num_returns=len(waited_for), timeout=0)[0] if ready else []


def _completion(ticket: int, reference: "ray.ObjectRef[Report]") -> Completion:
    try:
        return Completion(ticket, ray.get(reference))
    except Exception as error:
        return Completion(ticket, error=Breakage.of(error, KINDS))


def get_ready() -> None:
    """Import in a worker while the driver does, so that its first task needn't wait for that."""
    spare_imports()
    import_module("djdist.worker")


def spare_imports() -> None:
    """Exempt what is loaded from garbage collection, which would take half of the time of further imports."""
    gc.freeze()
