"""This machine: the caller's process, or processes of its own by loky."""

from collections.abc import Sequence

import loky

from djdist.errors import ClusterError, OptionError
from djdist.executor import Executor, default_places
from djdist.executors.futures import FuturesExecutor
from djdist.job import Completion, Ending, Job, Outcome, Work

SETTINGS_TRAVEL = "ignore:No datajoint.json found"
"""What DataJoint warns of is no lack in a process that gets its caller's settings."""


class LocalExecutor(Executor):
    """Runs tasks on this machine.

    Parameters
    ----------
    processes : int, optional
        1 (the default) makes the keys in the caller's own process; more, in so many
        fresh processes (not forks), each with its own connection. None or 0: as many as
        there are processors.
    """

    def __init__(self, processes: int | None = 1) -> None:
        if processes is not None and processes < 0:
            raise OptionError(f"processes={processes} must be at least 1, or None for all processors.")
        self.processes = processes or default_places()
        self.in_process = self.processes == 1

    def __repr__(self) -> str:
        return f"LocalExecutor(processes={self.processes})"

    def connect(self) -> None:
        self._tasks: Executor = _InProcess() if self.in_process else _Processes(self.processes)

    def disconnect(self) -> None:
        self._tasks.disconnect()

    def start(self, work: Work) -> None:
        self._tasks.start(work)

    def free_places(self) -> int:
        return self._tasks.free_places()

    def submit(self, name: str, jobs: Sequence[Job]) -> int:
        return self._tasks.submit(name, jobs)

    def wait(self, timeout_seconds: float) -> list[Completion]:
        return self._tasks.wait(timeout_seconds)

    def cancel(self, ticket: int) -> bool:
        return self._tasks.cancel(ticket)

    def close(self) -> None:
        self._tasks.close()


class _InProcess(Executor):
    """Makes one task at a time, when it is waited for."""

    def start(self, work: Work) -> None:
        self._work = work
        self._submitted = 0
        self._waiting: dict[int, tuple[Job, ...]] = {}

    def free_places(self) -> int:
        return 1 - len(self._waiting)

    def submit(self, name: str, jobs: Sequence[Job]) -> int:
        self._submitted += 1
        self._waiting[self._submitted] = tuple(jobs)
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        waiting, self._waiting = self._waiting, {}
        return [self._completed(ticket, jobs) for ticket, jobs in waiting.items()]

    def cancel(self, ticket: int) -> bool:
        return self._waiting.pop(ticket, None) is not None

    def close(self) -> None:
        self._waiting.clear()

    def _completed(self, ticket: int, jobs: Sequence[Job]) -> Completion:
        try:
            report = self._work(jobs)
        except Exception as error:
            return Completion(ticket, breakage=f"{type(error).__name__}: {error}")
        for outcome in report.outcomes:
            _pass_signal_on(outcome)
        return Completion(ticket, report)


class _Processes(FuturesExecutor):
    """A pool of its own, replaced when one of its processes dies or has to be stopped."""

    _pool: loky.ProcessPoolExecutor

    def __init__(self, processes: int) -> None:
        super().__init__(_pool(processes), processes)

    def disconnect(self) -> None:
        self._pool.shutdown(kill_workers=True)

    def submit(self, name: str, jobs: Sequence[Job]) -> int:
        try:
            return super().submit(name, jobs)
        except ClusterError:
            self._replace()
            return super().submit(name, jobs)

    def close(self) -> None:
        if self._tickets:
            super().close()
            self._replace()

    def _replace(self) -> None:
        self._pool.shutdown(kill_workers=True)
        self._pool = _pool(self._places)


def _pool(processes: int) -> loky.ProcessPoolExecutor:
    return loky.ProcessPoolExecutor(max_workers=processes, env={"PYTHONWARNINGS": SETTINGS_TRAVEL})


def _pass_signal_on(outcome: Outcome) -> None:
    if outcome.ending is Ending.INTERRUPTED and outcome.failure:
        assert isinstance(outcome.failure.exception, BaseException)
        raise outcome.failure.exception
