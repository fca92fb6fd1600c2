"""Contract of what keeps the jobs of one run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from djdist._job import Failure, Job


class JobStore(ABC):
    """Keeps jobs for one run, which is the owner of what it reserves.

    A store can be pickled and opens its connection where it is first used. What a run
    no longer owns it doesn't change: each verb below leaves such jobs alone.

    What the database refuses, or does not answer, is a DatabaseError. Of the store of several tables, those
    that keep a run alive (refresh, renew, rescue, release_all) are done for all others first.

    Attributes
    ----------
    sees_beginnings : bool
        It knows which jobs a worker has begun.
    keeps_made : bool
        It keeps jobs that were made.
    keeps_errors : bool
        It keeps errors, and those who come after the run's driver find them there.
    """

    sees_beginnings = True
    keeps_made = False
    keeps_errors = True

    def of(self, table: str) -> "JobStore":
        """Return the store of one table; it is this one, unless it keeps the jobs of several."""
        return self

    @abstractmethod
    def refresh(self) -> dict[str, int]:
        """Add new keys as pending, remove vanished ones, and return the numbers of both."""

    def add_new(self, parents: Sequence[Job]) -> int | None:
        """Add the jobs of new keys that come of these parents, made just now; return how many.

        None says that others are adding jobs, and that not all were added; they may be a while later.
        The parents are jobs of tables upstream that this one follows. What it costs grows with their number,
        not with the tables.
        """
        raise NotImplementedError

    @abstractmethod
    def reserve(self, limit: int, max_priority: int | None = None) -> list[Job]:
        """Reserve up to ``limit`` of the run's due jobs, the most urgent first.

        ``max_priority`` leaves the less urgent ones alone, whose number is greater.
        """

    @abstractmethod
    def next_priority(self) -> int | None:
        """Return the priority of the most urgent job that the run may reserve now, None without one."""

    def next_priorities(self) -> dict[str, int]:
        """Return the priority of the most urgent due job of each table that has one."""
        raise NotImplementedError

    @abstractmethod
    def reserved(self) -> list[Job]:
        """Return all that the run has reserved, also what it was never told of."""

    @abstractmethod
    def release(self, jobs: Sequence[Job], *, delay_seconds: float = 0) -> int:
        """Put reserved jobs back to pending, not due before a delay is over; return how many."""

    @abstractmethod
    def release_waiting(self, jobs: Sequence[Job]) -> list[Job]:
        """Put reserved jobs back to pending that are known not to have begun; return them."""

    @abstractmethod
    def release_all(self) -> None:
        """Put back to pending all that the run still has reserved."""

    @abstractmethod
    def fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> bool:
        """Record the error of a reserved job; False if it is not the run's any more."""

    def leave_out(self, failed: Sequence[Job]) -> None:
        """Leave alone what failed under a driver that was lost, where that is not kept here."""

    def note(self, jobs: Sequence[Job], text: str) -> None:
        """Keep with jobs that the run has reserved, or made, what people should know of them."""

    @abstractmethod
    def forget(self, job: Job) -> None:
        """Drop what is kept here of a job whose worker has finished it with its result."""

    @abstractmethod
    def renew(self, jobs: Sequence[Job]) -> list[Job]:
        """Renew the lease of reserved jobs; return which are still the run's."""

    @abstractmethod
    def rescue(self) -> int:
        """Put jobs whose lease ran out back to pending; return how many."""

    @abstractmethod
    def begun(self, jobs: Sequence[Job]) -> list[Job]:
        """Return which reserved jobs a worker has begun, as far as that is known."""

    @abstractmethod
    def handed_back(self, jobs: Sequence[Job]) -> bool:
        """Return whether a worker that was preempted has handed some of these reserved jobs back."""

    @abstractmethod
    def begun_by(self, host: str, pid: int) -> list[Job]:
        """Return which of all the run's reserved jobs one process has begun."""

    def end_sessions(self, jobs: Sequence[Job]) -> None:
        """End the sessions of dead workers that had begun these jobs, and no others of the run."""

    @abstractmethod
    def pending(self, most: int | None = None) -> int:
        """Return the number of due jobs that the run may still reserve, counted no further than ``most``."""

    def held_by_others(self) -> int:
        """Return the number of jobs that others, who are alive, have reserved."""
        return 0

    def held_back(self) -> dict[str, int]:
        """Return how many keys can't be made, by the table upstream whose errors hold them back."""
        return {}

    def assume_reached(self) -> None:
        """Take a database that can't be reached for one that is away for a while."""

    def wait_while(self, wanted: Callable[[], bool]) -> None:
        """Wait for a database that is away no longer than this is wanted."""

    def close(self) -> None:
        """Close the connection."""
