"""This machine: the caller's process, or processes of its own by loky."""

import concurrent.futures as cf
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import loky

from djdist._executor import Executor, default_slots
from djdist._job import Breakage, Completion, Ending, Job, Outcome, Report, TaskFunction
from djdist._needs import Needs, Node
from djdist._task_pool import TaskPool
from djdist.errors import OptionError
from djdist.executors.futures import completion_of
from djdist.shipping.pickled_task import Sendable, sent

SETTINGS_TRAVEL = "ignore:No datajoint.json found"
"""What DataJoint warns of is no lack in a process that gets its caller's settings."""

LIMITS_OF_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

PARENT_CHECK_SECONDS = 1.0


class LocalExecutor(Executor):
    """Runs tasks on this machine.

    Parameters
    ----------
    processes : int, optional
        1 (the default) makes the keys in the caller's own process; more, in so many
        fresh processes (not forks) per run, each with its own connection. None or 0: as many as
        there are processors.
    """

    def __init__(self, processes: int | None = 1) -> None:
        if processes is not None and processes < 0:
            raise OptionError(f"processes={processes} must be at least 1, or None for all processors.")
        self.processes = int(processes or default_slots())
        self.runs_in_caller = self.processes == 1
        self.can_kill = not self.runs_in_caller

    def __repr__(self) -> str:
        return f"LocalExecutor(processes={self.processes})"

    def connect(self) -> None:
        self._idle: list[loky.ProcessPoolExecutor] = []

    def disconnect(self) -> None:
        _kill(self._idle)

    def with_kill(self) -> "LocalExecutor":
        beside = LocalExecutor(self.processes)
        beside.runs_in_caller, beside.can_kill = False, True
        return beside if self.runs_in_caller else self

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        return _InCaller(tasks) if self.runs_in_caller else _InProcesses(self.processes, self._idle, tasks)


class _InCaller(TaskPool):
    """Makes one task at a time, when it is waited for."""

    runs_in_caller = True
    waits_for_room = False

    def __init__(self, tasks: Mapping[str, TaskFunction]) -> None:
        self._nodes = [Node({"cpus": 1}, slots=1)]
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


class _InProcesses(TaskPool):
    """Processes for one run, each in a pool of one: one that dies takes no other with it.

    What is idle at the end is left to the runs that follow, and to those that go on.
    """

    def __init__(
        self, processes: int, idle: list[loky.ProcessPoolExecutor], tasks: Mapping[str, TaskFunction]
    ) -> None:
        self._slots = processes
        self._nodes = [Node({"cpus": processes}, slots=processes)]
        self._idle = idle
        self._tasks = {table: (sent(work), work) for table, work in tasks.items()}
        self._waiting: dict[int, tuple[str, tuple[Job, ...]]] = {}
        self._running: dict[cf.Future[Report | None], _Running] = {}
        self._submitted = 0

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        self._submitted += 1
        self._waiting[self._submitted] = table, tuple(jobs)
        self._fill()
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        done, _ = cf.wait(self._running, timeout_seconds, cf.FIRST_COMPLETED)
        completions = [completion for future in done if (completion := self._ended(future))]
        self._fill()
        return completions

    def cancel(self, ticket: int) -> bool:
        return self._waiting.pop(ticket, None) is not None

    def kill(self, ticket: int) -> None:
        _kill([running.pool for running in self._running.values() if running.ticket == ticket])

    def close(self) -> None:
        self._waiting.clear()
        _kill([running.pool for running in self._running.values()])
        self._running.clear()

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._slots:
            ticket = next(iter(self._waiting))
            table, jobs = self._waiting.pop(ticket)
            running = _Running(ticket, table, jobs, self._idle_pool() or _pool_of_one(self._slots))
            self._send(self._tasks[table][0], running)

    def _idle_pool(self) -> loky.ProcessPoolExecutor | None:
        with suppress(IndexError):  # another thread's run may have taken the last one
            return self._idle.pop(0)
        return None

    def _send(self, work: Sendable, running: "_Running") -> None:
        try:
            future = running.pool.submit(work, running.jobs)
        except cf.BrokenExecutor:  # its process has died while it was idle
            _kill([running.pool])
            running = replace(running, pool=_pool_of_one(self._slots))
            future = running.pool.submit(work, running.jobs)
        self._running[future] = running

    def _ended(self, future: "cf.Future[Report | None]") -> Completion | None:
        running = self._running.pop(future)
        completion = completion_of(running.ticket, future)
        if completion is None:
            self._send(self._tasks[running.table][1], running)
        elif completion.report is None:
            _kill([running.pool])
        else:
            self._idle.append(running.pool)
        return completion


@dataclass(frozen=True)
class _Running:
    ticket: int
    table: str
    jobs: tuple[Job, ...]
    pool: loky.ProcessPoolExecutor


def _pool_of_one(processes: int) -> loky.ProcessPoolExecutor:
    return loky.ProcessPoolExecutor(
        max_workers=1,
        initializer=_begin,
        initargs=(os.getpid(), multiprocessing.get_start_method(allow_none=True)),
        env={"PYTHONWARNINGS": SETTINGS_TRAVEL, **_limits_of_threads(processes)},
    )


def _limits_of_threads(processes: int) -> dict[str, str]:
    """Share the processors out among the processes, for the libraries of which the user has not said it."""
    share = str(max(1, default_slots() // processes))
    everywhere = os.environ.get(
        "OMP_NUM_THREADS", share
    )  # the others heed it where they have no limit of their own
    return {name: os.environ.get(name, everywhere) for name in LIMITS_OF_THREADS}


def _kill(pools: Sequence[loky.ProcessPoolExecutor]) -> None:
    for pool in pools:
        pool.shutdown(kill_workers=True)


def _begin(parent: int, start_method: str | None) -> None:
    """Allow ``make()`` to start processes as at the caller: in a process of loky only one method works."""
    multiprocessing.set_start_method(start_method, force=True)
    _end_with_parent(parent)


def _end_with_parent(parent: int) -> None:
    """End this process when its caller was killed before it could close its pool.

    A Ctrl-C at the terminal reaches it too, but it is the caller who then gives it its grace.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="djdist-parent", daemon=True).start()


def _pass_signal_on(outcome: Outcome) -> None:
    if outcome.ending is Ending.INTERRUPTED and outcome.failure:
        assert isinstance(outcome.failure.exception, BaseException)
        raise outcome.failure.exception
