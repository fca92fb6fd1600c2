"""Contract of what runs tasks, on this machine or on a cluster."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from typing_extensions import Self

from djdist._job import Completion, Job, RunInfo, Status, Summary, TaskFunction, Watch
from djdist.errors import OptionError

Loop = Callable[["Executor", Watch], Summary]
"""The driver's loop through a whole run, given where its tasks go and who watches."""

Ask = Callable[[str], Any]
"""Asks the driver of a run for its ``status`` or ``result``, or lets it ``stop`` or ``forget`` the run."""


def window(places: int) -> int:
    """Give how many tasks to keep in flight for so many places.

    A few more than can run, so that no place waits for the driver and an
    autoscaler sees demand; never none, so that a cluster can grow from nothing.
    """
    return places + max(1, places // 4)


def default_places() -> int:
    """Give the number of processors that this process may use, by its affinity and its container's limit."""
    import loky

    return int(loky.cpu_count())


def task_name(table: str, jobs: Sequence[Job]) -> str:
    """Name a task for the dashboards."""
    return f"{table}({what_is_made(jobs)})" if jobs else f"{table} ({what_is_made(jobs)})"


def what_is_made(jobs: Sequence[Job]) -> str:
    """Tell a task by its first key; without a job it is a trial of the set-up."""
    more = f", +{len(jobs) - 1} more" if len(jobs) > 1 else ""
    return f"{jobs[0]}{more}" if jobs else "set-up"


class Executor(ABC):
    """Runs groups of jobs as tasks.

    The caller of ``populate()`` enters it and calls ``drive``; the driver, wherever it
    runs, uses ``start`` and what follows it. Entered by a ``with`` around several calls,
    it keeps for all of them the cluster that it started. A task runs once: whether it is tried
    again is the driver's business.

    Attributes
    ----------
    in_process : bool
        Tasks run in the caller's own thread, with the caller's own table.
    kills : bool
        It can end the process that runs a task.
    shows : bool
        It has a dashboard that shows a run's counts.
    predecessor : Status or None
        Where a driver that was lost had got to, if another one goes on with its run.
    taken_result_kept_seconds : float
        So long a detached run's result can be had again after somebody has waited for it.
    """

    in_process = False
    kills = True
    shows = False
    predecessor: Status | None = None
    taken_result_kept_seconds = 3600.0
    _entered = 0

    def __enter__(self) -> Self:
        if not self._entered:
            self.connect()
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if not self._entered:
            self.disconnect()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Keep others away for the time of a run: the tasks of two would be mixed up.

        Raises
        ------
        OptionError
            It is at a run of another thread.
        """
        me = object()
        if self.__dict__.setdefault("_taken_by", me) is not me:
            raise OptionError(
                f"{self!r} is at another run of this process: give each run that goes on at the same time "
                "an executor of its own."
            )
        try:
            yield
        finally:
            del self.__dict__["_taken_by"]

    def connect(self) -> None:
        """Join the cluster, or start one, with a clear error where that fails."""

    def drive(self, loop: Loop, watch: Watch, info: RunInfo) -> Summary:
        """Let the loop run where a driver belongs, here or on the cluster, and follow it to its end."""
        return loop(self, watch)

    def check_detaches(self) -> None:
        """See that runs here can go on without their caller.

        Raises
        ------
        OptionError
            They can't.
        """
        raise OptionError(
            f'{self!r} is no cluster that lives longer than this call: use executor="ray" with RAY_ADDRESS '
            'or ray.init(), or executor="dask" with a client or DASK_SCHEDULER_ADDRESS.'
        )

    def detach(self, loop: Loop, info: RunInfo) -> Ask:
        """Start a loop that goes on without its caller."""
        raise NotImplementedError

    def runs(self) -> list[tuple[RunInfo, Ask]]:
        """Find the runs whose drivers are on the cluster."""
        return []

    def disconnect(self) -> None:
        """Close what ``connect`` started; leave what it found."""

    def attach(self) -> None:
        """Take what only an actor's own thread can have; called before the run's thread begins."""

    def killing(self) -> "Executor":
        """Give this executor, or its like that ``kills``.

        Raises
        ------
        OptionError
            There is none.
        """
        if not self.kills:
            raise OptionError(
                f"{self!r} can't stop a make() that takes too long: leave timeout_seconds out, "
                "or use processes=, Ray or Dask."
            )
        return self

    def abandon(self) -> None:
        """End, for a caller that is gone, what ``close`` left to it."""

    @abstractmethod
    def start(self, work: TaskFunction) -> None:
        """Get ready to run ``work`` on groups of jobs."""

    def show(self, table: str, status: Status, make_seconds: Sequence[float]) -> None:
        """Let the dashboard show how a table's run stands; called about once a second and at the end.

        ``make_seconds`` tells of each task that has ended since how long it took for a key.
        """

    @abstractmethod
    def places(self) -> int:
        """Count the tasks that can run at the same time."""

    @abstractmethod
    def free_places(self) -> int:
        """Count the tasks that may be submitted now."""

    @abstractmethod
    def submit(self, table: str, jobs: Sequence[Job]) -> int:
        """Submit one task, which dashboards show by its table and key; return its ticket."""

    @abstractmethod
    def wait(self, timeout_seconds: float) -> list[Completion]:
        """Wait for tasks to end, not longer than the timeout, and return those that have."""

    @abstractmethod
    def cancel(self, ticket: int) -> bool:
        """Forget a task that has not begun; False if it has or that can't be told."""

    @abstractmethod
    def kill(self, ticket: int) -> None:
        """End the process that runs a task; where it ``kills``, the task then completes as broken."""

    @abstractmethod
    def close(self) -> None:
        """End what runs, as far as it can, and let go of what ``start`` took."""
