"""A scripted pool of tasks and a clock that tests set, to drive a Driver by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from djdist._job import (
    Breakage,
    BreakageKind,
    Completion,
    Counts,
    Ending,
    Failure,
    Job,
    Outcome,
    Policy,
    Recipe,
    Report,
)
from djdist._job_store import JobStore
from djdist._needs import Needs, Node
from djdist._task_pool import TaskPool, task_name
from djdist.driver import Driver, RunContext

SQUARE = Recipe("Square")


def driver_of(
    store: JobStore,
    pool: TaskPool,
    policy: Policy | None = None,
    recipe: Recipe = SQUARE,
    **clock_and_sleep: Any,
) -> Driver:
    """Give the driver of a run of one table."""
    recipes = {recipe.table: recipe}
    return Driver(RunContext(store, pool, recipes, policy or Policy(), recipe.table, **clock_and_sleep))


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class ScriptedPool(TaskPool):
    """Holds tasks until a test lets them end.

    ``answer`` says what to do with a task while it is waited for: give its completion or keep it running.
    """

    waits_for_room = False

    def __init__(self, slots: int, answer: Callable[[int, Job], Completion | None] | None = None) -> None:
        self.size = slots
        self._nodes: list[Node] = []
        self.answer = answer or (lambda ticket, job: made(ticket, job))
        self.running: dict[int, Job] = {}
        self.begun: list[Job] = []
        self.names: list[str] = []
        self.most_in_flight = 0
        self.overfull = False
        self.cancellable: set[int] = set()
        self.trial = Report()
        self.killed: list[Job] = []
        self.closed = False
        self.has_dashboard = False
        self.shown: list[tuple[str, Counts, tuple[float, ...]]] = []
        self._trials: list[int] = []
        self._submitted = 0

    def show(self, table: str, counts: Counts, make_seconds: Sequence[float]) -> None:
        self.shown.append((table, counts, tuple(make_seconds)))

    def nodes(self) -> Sequence[Node]:
        if self.size != len(self._nodes):
            self._nodes = [Node({"cpus": 1}, slots=1)] * self.size
        return self._nodes

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        self._submitted += 1
        self.names.append(task_name(table, jobs))
        if jobs:
            (job,) = jobs
            self.running[self._submitted] = job
            self.begun.append(job)
            self.overfull |= len(self.running) > self.size
        else:
            self._trials.append(self._submitted)
        self.most_in_flight = max(self.most_in_flight, len(self.running))
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        trials = [Completion(ticket, self.trial) for ticket in self._trials]
        self._trials.clear()
        answers = [self.answer(ticket, job) for ticket, job in list(self.running.items())]
        ended = [completion for completion in answers if completion]
        for completion in ended:
            del self.running[completion.ticket]
        return trials + ended

    def cancel(self, ticket: int) -> bool:
        if ticket in self.cancellable:
            del self.running[ticket]
            return True
        return False

    def kill(self, ticket: int) -> None:
        self.killed.append(self.running.pop(ticket))

    def close(self) -> None:
        self.closed = True
        self.running.clear()


def made(ticket: int, job: Job) -> Completion:
    return ended(ticket, job, Ending.MADE)


def failed(ticket: int, job: Job, message: str = "ValueError: no") -> Completion:
    return ended(ticket, job, Ending.FAILED, message)


def lost(ticket: int, job: Job) -> Completion:
    return Completion(ticket, error=Breakage(BreakageKind.WORKER_DIED, "WorkerCrashedError: out of memory"))


def ended(ticket: int, job: Job, ending: Ending, message: str = "") -> Completion:
    failure = Failure(message) if message else None
    return Completion(ticket, Report((Outcome(job, ending, failure),)))
