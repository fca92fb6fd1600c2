"""What the job store may still give, as far as it was asked."""

from collections.abc import Callable

from djdist._job import Job
from djdist._job_store import JobStore

WAIT_SECONDS = 0.5
"""After this time a run looks again for what has ended, and asks a store again that had too little."""
CLOCKS_DIFFER_SECONDS = 0.1
LOOK_AHEAD = 4
"""Looking this many times further than asked for spares a store most questions."""
LOOK_SECONDS = 2.0
"""After this time there may be more than what was seen last, unless the store takes long to tell."""
LOOKING_SHARE = 20


class Backlog:
    """Reserves what is pending of one table, and spares its store vain questions.

    It counts as empty only if it was so when nothing ran any more, and nothing that the
    run itself has put back is due later.

    Attributes
    ----------
    empty : bool
        Nothing is left to reserve.
    ran_short : bool
        The store had less than it was asked for.
    is_refilled : bool
        Something has come since this was last set back.
    pending : int
        What was left when it was last seen.
    """

    def __init__(self, store: JobStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self.pending = 0
        self._left, self._looks_at = 0, clock()
        self._due_at = clock()
        self.returned(0)

    def returned(self, count: int, pause_seconds: float = 0) -> None:
        """Count the jobs that the run has put back, or added."""
        self.empty = self.ran_short = False
        self.is_refilled = True
        self._asked_at = self._clock()
        self.pending += count
        self._left += count
        if pause_seconds:
            self._due_at = max(self._due_at, self._asked_at + pause_seconds + CLOCKS_DIFFER_SECONDS)

    def may_have_more(self, *, idle: bool) -> bool:
        """Return whether the store may have more by now."""
        now = self._clock()
        is_due = self._asked_at < self._due_at <= now
        return not self.ran_short or idle or is_due or now - self._asked_at >= WAIT_SECONDS

    def found_short(self) -> None:
        """Note that the store has nothing now."""
        self.ran_short, self._asked_at, self.pending, self._left = True, self._clock(), 0, 0

    def found_empty(self) -> None:
        """Note that nothing is to be had, and ask again later."""
        self.found_short()
        self.empty = True

    def reserve(self, limit: int, *, idle: bool, max_priority: int | None = None) -> list[Job]:
        """Reserve jobs, maybe only urgent ones; ``idle`` says that none of the run is in flight.

        What it holds then was reserved by a commit whose answer was lost.
        """
        jobs = self._store.reserve(limit, max_priority)
        if max_priority is not None and len(jobs) < limit:  # less urgent ones may be left
            self.pending, self._left = max(0, self.pending - len(jobs)), self._left - len(jobs)
            self.ran_short, self._asked_at = not jobs, self._clock()  # those that are due are locked
            return jobs
        if idle and not jobs:
            jobs = self._store.reserved()[:limit]
        self.empty = idle and not jobs and self._clock() >= self._due_at
        self.ran_short = len(jobs) < limit
        self._asked_at = self._clock()
        self.pending = 0 if self.ran_short else max(0, self.pending - len(jobs))
        self._left -= len(jobs)
        return jobs

    def estimate(self, enough: int) -> int:
        """Estimate what is left, no further than to what is enough; what others do is seen late."""
        began_at = self._clock()
        if self._left < enough and began_at >= self._looks_at:
            self._left = self._store.pending(LOOK_AHEAD * enough)
            if self._left < LOOK_AHEAD * enough:
                now = self._clock()
                self._looks_at = now + max(LOOK_SECONDS, LOOKING_SHARE * (now - began_at))
        return max(0, min(self._left, enough))

    def found(self, count: int) -> None:
        """Note what was counted."""
        self.pending = 0 if self.empty else count

    def count_in_the_end(self) -> None:
        """Count what others may go on with, unless the store was seen empty."""
        if not self.empty:
            self.pending = self._store.pending()
