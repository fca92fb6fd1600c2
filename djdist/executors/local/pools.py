"""The tasks of one run on this machine: in the caller, or in processes."""

import concurrent.futures as cf
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from djdist._job import Breakage, BreakageKind, Completion, Ending, Job, Outcome, Report, TaskFunction
from djdist._needs import Needs, Node
from djdist._task_pool import TaskPool
from djdist.executors.futures import completion_of
from djdist.executors.local.memory import MemoryWatch
from djdist.executors.local.process import Process
from djdist.executors.local.processes import Processes
from djdist.shipping.pickled_task import Sendable, sent

LOOK_SECONDS = 0.1
IDLE_SECONDS = 10.0
"""So long a process keeps its GPU without work."""
SWITCH_SECONDS = 60.0
"""So long others wait for a GPU at least, while its process has more for what it has loaded there."""


class InCaller(TaskPool):
    """Makes one task at a time, when it is waited for."""

    runs_in_caller = True
    waits_for_room = may_grow = False

    def __init__(self, node: Node, tasks: Mapping[str, TaskFunction]) -> None:
        self._nodes = (node,)
        self._tasks = tasks
        self._submitted = 0
        self._waiting: dict[int, tuple[TaskFunction, tuple[Job, ...]]] = {}

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        self._submitted += 1
        self._waiting[self._submitted] = self._tasks[table], tuple(jobs)
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        waiting, self._waiting = self._waiting, {}
        return [_completed(ticket, work, jobs) for ticket, (work, jobs) in waiting.items()]

    def cancel(self, ticket: int) -> bool:
        return self._waiting.pop(ticket, None) is not None

    def kill(self, ticket: int) -> None:
        """Can't be done without the caller."""

    def close(self) -> None:
        self._waiting.clear()


def _completed(ticket: int, work: TaskFunction, jobs: Sequence[Job]) -> Completion:
    try:
        report = work(jobs)
    except Exception as error:
        return Completion(ticket, error=Breakage.of(error))
    for outcome in report.outcomes:
        _pass_signal_on(outcome)
    return Completion(ticket, report)


def _pass_signal_on(outcome: Outcome) -> None:
    if outcome.ending is Ending.INTERRUPTED and outcome.failure:
        assert isinstance(outcome.failure.exception, BaseException)
        raise outcome.failure.exception


@dataclass(frozen=True)
class _Waiting:
    table: str
    jobs: tuple[Job, ...]
    needs: Needs
    since: float


@dataclass(frozen=True)
class _Running:
    ticket: int
    task: _Waiting
    process: Process


class InProcesses(TaskPool):
    """Runs tasks in processes that it shares with the runs that follow, and those that go on.

    What it has loaded into a GPU for a table, a process keeps for the next key of that, and ends when others
    need the GPU, or the run ends.
    """

    may_grow = False

    def __init__(self, node: Node, processes: Processes, tasks: Mapping[str, TaskFunction]) -> None:
        self._nodes = (node,)
        self._processes = processes
        self._left = dict(node.amounts)
        self._slots = node.slots or 0
        self._tasks = {table: (sent(work), work) for table, work in tasks.items()}
        self._waiting: dict[int, _Waiting] = {}
        self._running: dict[cf.Future[Report | None], _Running] = {}
        self._memory = MemoryWatch()
        self._submitted = 0

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        self._submitted += 1
        self._waiting[self._submitted] = _Waiting(table, tuple(jobs), needs, time.monotonic())
        self._fill()
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        if self._waiting and not self._running:
            time.sleep(min(timeout_seconds, LOOK_SECONDS))  # another run has the GPUs
        done, _ = cf.wait(self._running, timeout_seconds, cf.FIRST_COMPLETED)
        completions = [completion for future in done if (completion := self._ended(future))]
        self._memory.look({running.process: running.task.needs for running in self._running.values()})
        self._fill()
        self._processes.end_idle(self._is_idle_for_long)
        return completions

    def cancel(self, ticket: int) -> bool:
        return self._waiting.pop(ticket, None) is not None

    def kill(self, ticket: int) -> None:
        for running in self._running.values():
            if running.ticket == ticket:
                running.process.end()

    def close(self) -> None:
        self._waiting.clear()
        for running in self._running.values():
            self._processes.end(running.process)
        self._running.clear()
        self._processes.end_idle(lambda process: bool(process.gpus) and process.run is self)

    def _fill(self) -> None:
        """Begin what fits, the oldest first; what doesn't fit holds back only what needs as much."""
        held: set[Needs] = set()
        for ticket in self._in_order():
            task = self._waiting[ticket]
            if task.needs not in held and not self._begin(ticket, task):
                held.add(task.needs)

    def _in_order(self) -> list[int]:
        """Return what waits: what a GPU is ready for goes first, unless others have waited for long."""
        on_gpus = [task for task in self._waiting.values() if task.needs.gpus]
        if not on_gpus or time.monotonic() - on_gpus[0].since > SWITCH_SECONDS:
            return list(self._waiting)
        warm = {
            ticket
            for ticket, task in self._waiting.items()
            if task.needs.gpus and self._processes.is_warm(self, task.table, task.needs)
        }
        return sorted(self._waiting, key=lambda ticket: (ticket not in warm, ticket))

    def _begin(self, ticket: int, task: _Waiting) -> bool:
        if len(self._running) >= self._slots or not self._fits(task.needs):
            return False
        process = self._processes.take(self, task.table, task.needs)
        if process is None:
            return False
        del self._waiting[ticket]
        self._change_left(task.needs, -1)
        self._send(self._tasks[task.table][0], _Running(ticket, task, process))
        return True

    def _fits(self, needs: Needs) -> bool:
        return all(self._left.get(name, 0) > amount - 1e-9 for name, amount in needs.amounts.items())

    def _change_left(self, needs: Needs, sign: int) -> None:
        for name, amount in needs.amounts.items():
            self._left[name] = self._left.get(name, 0) + sign * amount

    def _send(self, work: Sendable, running: _Running) -> None:
        self._running[running.process.submit(work, running.task.jobs)] = running

    def _ended(self, future: "cf.Future[Report | None]") -> Completion | None:
        running = self._running.pop(future)
        completion = completion_of(running.ticket, future)
        if completion is None:
            self._send(self._tasks[running.task.table][1], running)
            return None
        self._change_left(running.task.needs, 1)
        if completion.report is not None:
            self._processes.give_back(running.process)
            return completion
        self._processes.end(running.process)
        message = self._memory.explanation(running.process)
        return (
            Completion(running.ticket, error=Breakage(BreakageKind.OUT_OF_MEMORY, message))
            if message
            else completion
        )

    def _is_idle_for_long(self, process: Process) -> bool:
        idle_seconds = time.monotonic() - process.idle_since
        return bool(process.gpus) and process.run is self and idle_seconds > IDLE_SECONDS
