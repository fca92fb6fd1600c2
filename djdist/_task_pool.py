"""Contract of where the tasks of one run go."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType

from typing_extensions import Self

from djdist._job import Completion, Counts, Job
from djdist._needs import Needs, Node


def task_name(table: str, jobs: Sequence[Job]) -> str:
    """Return the name of a task for the dashboards."""
    return f"{table}({what_is_made(jobs)})" if jobs else f"{table} ({what_is_made(jobs)})"


def what_is_made(jobs: Sequence[Job]) -> str:
    """Describe a task by its first key; without a job it is a trial of the set-up."""
    more = f", +{len(jobs) - 1} more" if len(jobs) > 1 else ""
    return f"{jobs[0]}{more}" if jobs else "set-up"


class TaskPool(ABC):
    """Runs groups of jobs as tasks, for one run; those of other runs are none of its business.

    A task runs once: whether it is tried again is the driver's business. Left by a ``with``,
    it is closed.

    Attributes
    ----------
    runs_in_caller : bool
        Tasks run in the thread that waits for them.
    may_grow : bool
        Nodes may come that it doesn't have yet.
    waits_for_room : bool
        It takes some more tasks than fit, so that no slot waits for the driver and an autoscaler sees demand.
    has_dashboard : bool
        Its cluster has a dashboard that shows a run's counts.
    """

    runs_in_caller = False
    may_grow = True
    waits_for_room = True
    has_dashboard = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def nodes(self) -> Sequence[Node]:
        """Return what each node has, whether free or not; the same object while nothing has changed."""

    @abstractmethod
    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        """Submit one task, which dashboards show by its table and key; return its ticket.

        It begins when its needs fit beside what runs; tasks of the same needs begin in their order, and
        those of others don't wait behind them. No jobs is a trial of the set-up.
        """

    @abstractmethod
    def wait(self, timeout_seconds: float) -> list[Completion]:
        """Wait for tasks to end, not longer than the timeout, and return those that have."""

    @abstractmethod
    def cancel(self, ticket: int) -> bool:
        """Forget a task that has not begun; False if it has or that can't be told."""

    @abstractmethod
    def kill(self, ticket: int) -> None:
        """End the process that runs a task; where its executor ``can_kill``, the task completes as broken."""

    def show(self, table: str, counts: Counts, make_seconds: Sequence[float]) -> None:
        """Show on the dashboard how a table of the run stands; called about once per second and at the end.

        The first call says where counting begins. ``make_seconds`` holds, of each task that has ended
        since the last call, how long it took for a key.
        """

    @abstractmethod
    def close(self) -> None:
        """End what runs, as far as it can, and forget the rest; may be called again."""
