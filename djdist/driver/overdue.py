"""What takes long: keys that take too long, and those that wait behind one."""

from collections.abc import Callable, Iterable, Mapping

from djdist._job import GROUP_SECONDS, SHARED_SECONDS, Ending, Failure, Outcome, Recipe
from djdist.driver.tasks import Task

CHECKS = 10
CLOCKS_DIFFER_SECONDS = 2.0
LOOK_SECONDS = GROUP_SECONDS / 2
LAST_BEGIN_SECONDS = GROUP_SECONDS + CLOCKS_DIFFER_SECONDS
"""A worker that has been busy for so long is sure to begin no more keys of its group."""


class Overdue:
    """Finds the tasks whose key takes longer than it may.

    Parameters
    ----------
    recipes : mapping of str to Recipe
        How long the keys of each table may take.
    clock : callable
        Seconds that pass.
    sees_beginnings : bool
        It is known which jobs have begun; else a job's time counts from its submission.

    Attributes
    ----------
    period_seconds : float
        After so long it has to be known again which jobs run.
    """

    def __init__(
        self, recipes: Mapping[str, Recipe], clock: Callable[[], float], *, sees_beginnings: bool
    ) -> None:
        self._limits = {
            table: recipe.timeout_seconds
            for table, recipe in recipes.items()
            if recipe.timeout_seconds is not None
        }
        self.period_seconds = min(self._limits.values(), default=float("inf")) / CHECKS
        self._clock = clock
        self._sees_beginnings = sees_beginnings
        self._looked_at = clock()

    def suspects(self, tasks: Iterable[Task]) -> list[Task]:
        """Return, when it is time to look, the tasks of which it has to be known what runs."""
        if self._clock() - self._looked_at < self.period_seconds:
            return []
        self._looked_at = self._clock()
        return [task for task in tasks if task.table in self._limits]

    def among(self, tasks: Iterable[Task]) -> list[Task]:
        """Return the tasks that run a key for too long."""
        return [task for task in tasks if task.running and self._is_over(task, _since(task))]

    def explains(self, task: Task) -> bool:
        """Return whether a worker that died with this task may have ended itself because of the timeout."""
        if self._sees_beginnings:
            return bool(self.among([task]))
        return self._is_over(task, task.submitted_at)

    def outcome(self, task: Task) -> Outcome:
        """Return what became of the key that took too long."""
        error = TimeoutError(f"timed out after {self._limits[task.table]:g} seconds")
        kinds = ("TimeoutError", "OSError", "Exception")
        job = task.running or task.jobs[0]
        return Outcome(job, Ending.FAILED, Failure(f"TimeoutError: {error}", "", error, kinds))

    def _is_over(self, task: Task, since: float) -> bool:
        return self._clock() - since >= self._limits.get(task.table, float("inf"))


def _since(task: Task) -> float:
    """Return since when the job runs; with others in its transaction it may have been preceded by these."""
    return task.running_since + SHARED_SECONDS * (len(task.suspects) > 1)


class BlockedJobs:
    """Finds the tasks whose jobs wait behind one that takes long, as its worker begins no more of them.

    Parameters
    ----------
    clock : callable
        Seconds that pass.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._looked_at = clock()

    def suspects(self, tasks: Iterable[Task]) -> list[Task]:
        """Return, when it is time to look, the groups that have been there for a while."""
        now = self._clock()
        if now - self._looked_at < LOOK_SECONDS:
            return []
        self._looked_at = now
        return [task for task in tasks if len(task.jobs) > 1 and now - task.submitted_at >= LOOK_SECONDS]

    def among(self, tasks: Iterable[Task]) -> list[Task]:
        """Return the tasks whose worker is sure to begin no more than what it was seen to make."""
        now = self._clock()
        return [task for task in tasks if task.blocked and now - task.running_since >= LAST_BEGIN_SECONDS]
