"""Contract of what runs tasks, on this machine or on a cluster."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from typing_extensions import Self

from djdist._job import RunInfo, Status, Summary, TaskFunction, Watch
from djdist._needs import Needs
from djdist._task_pool import TaskPool
from djdist.errors import OptionError

Loop = Callable[["Executor", Watch, Status | None], Summary]
"""The driver's loop through a whole run, given where to open its pool and who watches.

The last is where a driver of this run had got to that was lost, None for the first one.
"""

ActorCall = Callable[[str], Any]
"""Asks the driver of a run for its ``status`` or ``result``, or lets it ``stop`` or ``forget`` the run."""


def default_slots() -> int:
    """Return how many processors this process may use, by its affinity and its container's limit."""
    import loky

    return int(loky.cpu_count())


class Executor(ABC):
    """Runs groups of jobs as tasks: a cluster, or what serves as one.

    The caller of ``populate()`` enters it and calls ``drive``; the driver, wherever it
    runs, opens a pool for its tasks. Several runs may do so at the same time, from several threads.
    Entered by a ``with`` around several calls, it keeps for all of them the cluster that it started.

    Attributes
    ----------
    runs_in_caller : bool
        Tasks run in the caller's own thread, with the caller's own table.
    needs : Needs
        What one key needs of a table that doesn't say it.
    can_kill : bool
        It can end the process that runs a task.
    taken_result_kept_seconds : float
        So long a detached run's result can be had again after somebody has waited for it.
    """

    runs_in_caller = False
    can_kill = True
    needs = Needs()
    taken_result_kept_seconds = 3600.0
    _entered: int
    _entering: threading.RLock

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Count from nothing how often it is entered, also where it comes out of a pickle."""
        executor = super().__new__(cls)
        executor._entered, executor._entering = 0, threading.RLock()
        return executor

    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in self.__dict__.items() if name not in ("_entered", "_entering")}

    def __enter__(self) -> Self:
        with self._entering:
            if not self._entered:
                self.connect()
            self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._entering:
            self._entered -= 1
            if not self._entered:
                self.disconnect()

    def connect(self) -> None:
        """Join the cluster, or start one, with a clear error where that fails."""

    def prepare(self, table: str) -> None:
        """Begin what takes long to start, while the run of a table is still put together."""

    def drive(self, loop: Loop, watch: Watch, info: RunInfo, predecessor: Status | None = None) -> Summary:
        """Run the loop where a driver belongs, here or on the cluster, and follow it to its end.

        ``predecessor`` is where a driver of this run had got to that was lost before.
        """
        return loop(self, watch, predecessor)

    def check_detaches(self) -> None:
        """Check that runs here can go on without their caller.

        Raises
        ------
        OptionError
            They can't.
        """
        raise OptionError(
            f'{self!r} is no cluster that lives longer than this call: use executor="ray" with RAY_ADDRESS '
            'or ray.init(), or executor="dask" with a client or DASK_SCHEDULER_ADDRESS.'
        )

    def detach(self, loop: Loop, info: RunInfo) -> ActorCall:
        """Start a loop that goes on without its caller."""
        raise NotImplementedError

    def runs(self) -> list[tuple[RunInfo, ActorCall]]:
        """Find the runs whose drivers are on the cluster."""
        return []

    def disconnect(self) -> None:
        """Close what ``connect`` started, and leave what it found open."""

    def check_needs(self, table: str, needs: Needs) -> None:
        """Check that what keys of a table need can be had, now or once the cluster has grown.

        Raises
        ------
        OptionError
            It never can.
        """

    def attach(self) -> None:
        """Take what only an actor's own thread can have; called before the run's thread begins."""

    def with_kill(self) -> "Executor":
        """Return this executor, or its like that ``can_kill``.

        Raises
        ------
        OptionError
            There is none.
        """
        if not self.can_kill:
            raise OptionError(
                f"{self!r} can't stop a make() that takes too long: leave timeout_seconds out, "
                "or use processes=, Ray or Dask."
            )
        return self

    def abandon(self) -> None:
        """End, for a caller that is gone, what the closed pool left to it."""

    @abstractmethod
    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        """Open a pool for one run; ``tasks`` holds by table what makes groups of its jobs."""
