"""What makes keys: Ray's own tasks, or actors that keep their process and its GPU."""

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

import ray
from ray import exceptions

from djdist._job import Breakage, BreakageKind, Completion, Job, Report, TaskFunction
from djdist._needs import Needs, Node
from djdist.executors.ray.nodes import ray_options

logger = logging.getLogger(__name__)

IDLE_SECONDS = 10.0
LINGER_SECONDS = 1.0
"""So long a process keeps its GPU, though it has no work and others have: its next key may be on the way."""
SWITCH_SECONDS = 60.0
"""So long others wait for a GPU at least, while its process has more for what it has loaded there."""
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
    """How Ray runs keys, whatever they need.

    ``warm`` ones with a GPU stay in their process, and the process keeps its GPU, from one key to the next.
    """

    options: dict[str, Any]
    warm: bool

    def remote(self, what: Callable[..., Any], **options: Any) -> Any:
        """Turn a function or a class into what runs as keys do."""
        remote: Any = ray.remote
        return remote(**options, **self.options)(what) if options or self.options else remote(what)


class Tasks:
    """Runs groups of jobs as Ray's own tasks."""

    def __init__(self, keys: KeyOptions, works: Mapping[str, TaskFunction]) -> None:
        self._task = keys.remote(_do, max_retries=0)
        self._works = works
        self._tickets: dict[ray.ObjectRef[Report], int] = {}

    def submit(self, ticket: int, table: str, jobs: tuple[Job, ...], needs: Needs, name: str) -> None:
        task = self._task.options(name=name, **ray_options(needs))
        self._tickets[task.remote(self._works[table], jobs)] = ticket

    @property
    def references(self) -> Iterable[Any]:
        """What tells that something has ended."""
        return self._tickets

    def take(self, ready: Iterable[Any]) -> list[Completion]:
        """Return what has ended of what is ready."""
        ended = [reference for reference in ready if reference in self._tickets]
        return [_completion(self._tickets.pop(reference), reference) for reference in ended]

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


Kind = tuple[str, Needs]
"""A table and what its keys need: the keys that one process makes."""


class _Waiting(NamedTuple):
    kind: Kind
    jobs: tuple[Job, ...]
    name: str
    since: float


class _Idle(NamedTuple):
    since: float
    kind: Kind
    actor: Any


class WarmWorkers:
    """Runs groups of jobs in actors, which end with the run, also where its driver is killed.

    Ray ends the process of a GPU task with the task, because the next one may be given another GPU,
    which a process that has loaded CUDA doesn't notice. An actor has the same one to its end, and makes
    the keys of one table only: what they have loaded would leave no room for another's.
    """

    def __init__(
        self, keys: KeyOptions, works: Mapping[str, TaskFunction], nodes: Callable[[], Sequence[Node]]
    ) -> None:
        self._actor = keys.remote(WarmWorker)
        self._works = works
        self._nodes = nodes
        self._waiting: dict[int, _Waiting] = {}
        self._starting: dict[ray.ObjectRef[None], tuple[Kind, Any]] = {}
        self._busy: dict[ray.ObjectRef[Report], tuple[int, Kind, Any]] = {}
        self._idle: list[_Idle] = []
        self._short_at: dict[Kind, float] = {}
        self._told: set[str] = set()

    def submit(self, ticket: int, table: str, jobs: tuple[Job, ...], needs: Needs, name: str) -> None:
        if table not in self._told:
            self._told.add(table)
            logger.info(
                "Each GPU slot keeps its process, and what that has loaded, for the keys of %s", table
            )
        self._short_at[table, needs] = time.monotonic()
        self._waiting[ticket] = _Waiting((table, needs), jobs, name, time.monotonic())
        self._hand_out()

    @property
    def references(self) -> Iterable[Any]:
        """What tells that something has ended or is ready for work."""
        return [*self._busy, *self._starting]

    def take(self, ready: Iterable[Any]) -> list[Completion]:
        """Return what has ended of what is ready, and give work to what has none."""
        ended = [self._end(reference) for reference in ready if reference in self._busy]
        refused = [self._begin(reference) for reference in ready if reference in self._starting]
        self._hand_out()
        self._let_go()
        return [*ended, *(completion for completion in refused if completion)]

    def _hand_out(self) -> None:
        self._give_way()
        for ticket, waiting in list(self._waiting.items()):
            if idle := max(
                (idle for idle in self._idle if idle.kind == waiting.kind), default=None, key=_since
            ):
                self._idle.remove(idle)  # the one that was busy last, so that others may be let go
                del self._waiting[ticket]
                self._do(ticket, waiting, idle.actor)
        starting = Counter(kind for kind, _ in self._starting.values())
        for kind, count in Counter(waiting.kind for waiting in self._waiting.values()).items():
            for _ in range(count - starting[kind]):
                actor = self._actor.options(**ray_options(kind[1])).remote()
                self._starting[actor.get_ready.remote()] = kind, actor

    def _do(self, ticket: int, waiting: _Waiting, actor: Any) -> None:
        work = self._works[waiting.kind[0]]
        self._busy[actor.do.options(name=waiting.name).remote(work, waiting.jobs)] = (
            ticket,
            waiting.kind,
            actor,
        )

    def _give_way(self) -> None:
        """End what is idle on a GPU for which others wait; what has more to do there, after a while."""
        waiting = {waiting.kind: waiting.since for waiting in reversed(self._waiting.values())}
        working = {kind for _, kind, _ in self._busy.values()} | {idle.kind for idle in self._idle}
        now = time.monotonic()
        for kind, since in waiting.items() if self._idle else ():
            is_overdue = kind not in working and now - since > SWITCH_SECONDS
            for idle in sorted(self._idle, key=_since):
                has_more = idle.kind in waiting or now - idle.since < LINGER_SECONDS
                if idle.kind != kind and (is_overdue or not has_more) and self._lacks_gpus(kind):
                    self._idle.remove(idle)
                    ray.kill(idle.actor)

    def _lacks_gpus(self, kind: Kind) -> bool:
        there = sum(node.amounts.get("gpus", 0) for node in self._nodes())
        holding = [*(kind for _, kind, _ in self._busy.values()), *(idle.kind for idle in self._idle)]
        return there - sum(needs.gpus for _, needs in holding) < kind[1].gpus

    def _begin(self, reference: "ray.ObjectRef[None]") -> Completion | None:
        kind, actor = self._starting.pop(reference)
        try:
            ray.get(reference)
        except Exception as error:
            return self._refused_longest(kind, error)
        self._idle.append(_Idle(time.monotonic(), kind, actor))
        return None

    def _refused_longest(self, kind: Kind, error: Exception) -> Completion | None:
        ticket = next((ticket for ticket, waiting in self._waiting.items() if waiting.kind == kind), None)
        if ticket is None:
            return None
        del self._waiting[ticket]
        return Completion(ticket, error=_breakage(error))

    def _end(self, reference: "ray.ObjectRef[Report]") -> Completion:
        ticket, kind, actor = self._busy.pop(reference)
        completion = _completion(ticket, reference)
        if completion.report:
            self._idle.append(_Idle(time.monotonic(), kind, actor))
        else:
            ray.kill(actor)
        return completion

    def _let_go(self) -> None:
        """End what has had no work for some seconds, so that others get its GPU."""
        now = time.monotonic()
        self._short_at.update({waiting.kind: now for waiting in self._waiting.values()})
        unwanted = {kind for kind, short_at in self._short_at.items() if now - short_at > IDLE_SECONDS}
        for reference in [reference for reference, (kind, _) in self._starting.items() if kind in unwanted]:
            ray.kill(self._starting.pop(reference)[1])
        for kind in unwanted:  # there may be one for each key that says its own needs
            del self._short_at[kind]
        _end_all([idle.actor for idle in self._idle if now - idle.since > IDLE_SECONDS])
        self._idle = [idle for idle in self._idle if now - idle.since <= IDLE_SECONDS]

    def cancel(self, ticket: int) -> bool:
        return self._waiting.pop(ticket, None) is not None

    def kill(self, ticket: int) -> None:
        self.cancel(ticket)
        _end_all([actor for running, _, actor in self._busy.values() if running == ticket])

    def close(self) -> None:
        busy = [actor for _, _, actor in self._busy.values()]
        starting = [actor for _, actor in self._starting.values()]
        _end_all([*busy, *starting, *(idle.actor for idle in self._idle)])
        for part in (self._waiting, self._starting, self._busy, self._idle):
            part.clear()


def _since(idle: _Idle) -> float:
    return idle.since


def _end_all(actors: Iterable[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def _do(work: TaskFunction, jobs: Sequence[Job]) -> Report:
    return work(jobs)


def ready(references: Iterable[Any], timeout_seconds: float) -> list[Any]:
    """Wait until one is ready, and return all that are."""
    waited_for = list(references)
    first, _ = ray.wait(waited_for, timeout=timeout_seconds)
    return ray.wait(waited_for, num_returns=len(waited_for), timeout=0)[0] if first else []


def _completion(ticket: int, reference: "ray.ObjectRef[Report]") -> Completion:
    try:
        return Completion(ticket, ray.get(reference))
    except Exception as error:
        return Completion(ticket, error=_breakage(error))


def _breakage(error: Exception) -> Breakage:
    """Describe what Ray raised, without the pages that it has to say on a node's memory."""
    breakage = Breakage.of(error, KINDS)
    if breakage.kind is BreakageKind.OUT_OF_MEMORY:
        return replace(breakage, message=breakage.message.partition("\n")[0])
    return breakage


def get_ready() -> None:
    """Import in a worker while the driver does, so that its first task needn't wait for that."""
    spare_imports()
    import_module("djdist.worker")


def spare_imports() -> None:
    """Exempt what is loaded from garbage collection, which would take half of the time of further imports."""
    gc.freeze()
