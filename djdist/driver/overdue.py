"""Which jobs take longer than they may."""

from collections.abc import Callable

from djdist._job import Failure, Job

CHECKS = 10


class Overdue:
    """Knows since when jobs have been running, as far as it is told.

    Parameters
    ----------
    timeout_seconds : float or None
        How long a job may take.
    clock : callable
        Seconds that pass.
    sees_beginnings : bool
        It is told which jobs have begun; else a job's time counts from its submission.

    Attributes
    ----------
    period_seconds : float
        After so long it wants to be told again which jobs have begun.
    failure : Failure
        What a job becomes that took too long.
    """

    def __init__(
        self, timeout_seconds: float | None, clock: Callable[[], float], *, sees_beginnings: bool
    ) -> None:
        self._timeout_seconds = timeout_seconds or float("inf")
        self.period_seconds = self._timeout_seconds / CHECKS
        error = TimeoutError(f"timed out after {self._timeout_seconds:g} seconds")
        self.failure = Failure(f"TimeoutError: {error}", "", error, ("TimeoutError", "OSError", "Exception"))
        self._clock = clock
        self._sees_beginnings = sees_beginnings
        self._asked_at = clock()
        self._submitted_at: dict[int, float] = {}
        self._begun_at: dict[int, tuple[Job, float]] = {}

    def note(self, ticket: int) -> None:
        """Note that a task was submitted."""
        self._submitted_at[ticket] = self._clock()

    def explains(self, ticket: int) -> bool:
        """Tell whether a worker that died with this task may have ended itself because of the timeout."""
        now = self._clock()
        if self._sees_beginnings:
            _, since = self._begun_at.get(ticket, (None, now))
        else:
            since = self._submitted_at.get(ticket, now)
        return now - since >= self._timeout_seconds

    def forget(self, ticket: int) -> None:
        """Note that a task has ended."""
        self._submitted_at.pop(ticket, None)
        self._begun_at.pop(ticket, None)

    def asks(self) -> bool:
        """Tell whether it is time to look which jobs have begun."""
        return self._clock() - self._asked_at >= self.period_seconds

    def among(self, running: dict[int, Job]) -> list[int]:
        """Give the tickets of what has been running for too long, told which job of each task runs."""
        self._asked_at = now = self._clock()
        known = {
            ticket: since for ticket, (job, since) in self._begun_at.items() if running.get(ticket) == job
        }
        self._begun_at = {ticket: (job, known.get(ticket, now)) for ticket, job in running.items()}
        return [t for t, (_, since) in self._begun_at.items() if now - since >= self._timeout_seconds]
