"""Which keys share a task, and how many."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from djdist._job import GROUP_SECONDS, Identity, Job

CLOCKS_DIFFER_SECONDS = 2.0
LARGEST = 500
GROWTH = 8
SHARES = 2
"""Near the end, a place is to get its fair share of what is left in so many groups."""
SMALLEST_SHARE = 8
"""But a whole group is never divided by more than this."""


class Grouping:
    """Sizes groups by how long keys take, as joblib does [1]_, and never much larger than the one before.

    Parameters
    ----------
    task_seconds : float
        How long a task should take: long enough to hide what it costs to send one.

    Attributes
    ----------
    size : int
        The number of keys that should share a task now.

    References
    ----------
    .. [1] ``joblib.Parallel``, ``batch_size="auto"``.
    .. [2] Hummel, Schonberg and Flynn, Factoring: a method for scheduling parallel loops. CACM 35(8), 1992.
    """

    def __init__(self, task_seconds: float = 0.5) -> None:
        self.size = 1
        self._task_seconds = task_seconds
        self._seconds = 0.0
        self._alone: set[Identity] = set()

    def note(self, count: int, seconds: float, *, cut: bool = False) -> None:
        """Note how long a worker took for so many keys, and whether one that failed cut the group short."""
        if count and seconds:
            latest = seconds / count
            self._seconds = (self._seconds + latest) / 2 if self._seconds else latest
            fitting = int(min(self._task_seconds / self._seconds, LARGEST))
            before = count if cut else max(count, self.size // GROWTH)
            self.size = max(1, min(fitting, GROWTH * before))

    def isolate(self, jobs: Sequence[Job]) -> None:
        """Give each of these a task of its own, because one of them may have killed their worker."""
        if len(jobs) > 1:
            self._alone |= {job.identity for job in jobs}

    def size_of_shares(self, left: Callable[[int], int], slots: int) -> int:
        """Give the size, smaller where little is left, so that all slots end about together [2]_.

        Parameters
        ----------
        left : callable
            Counts the keys that are left, no further than to a number.
        slots : int
            How many slots share them.
        """
        shares = SHARES * max(1, slots)
        share = -(-left(shares * self.size) // shares) if self.size > 1 else 1
        return max(share, self.size // SMALLEST_SHARE, 1)

    def split(self, jobs: Sequence[Job], size: int, slots: int) -> Iterator[tuple[Job, ...]]:
        """Divide jobs into groups of a size, or into so many groups if there are fewer jobs."""
        alone = [job for job in jobs if job.identity in self._alone]
        others = [job for job in jobs if job.identity not in self._alone] if alone else jobs
        self._alone -= {job.identity for job in alone}
        yield from ((job,) for job in alone)
        size = max(1, min(size, -(-len(others) // slots)))
        yield from (tuple(others[first : first + size]) for first in range(0, len(others), size))


class Waiting:
    """Finds what waits behind a key that takes long, once its worker is sure to begin no more of its group.

    Parameters
    ----------
    clock : callable
        Seconds that pass.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._asked_at = clock()
        self._known: set[int] = set()
        self._seen_at: dict[int, float] = {}

    def suspects(self, in_flight: Mapping[int, Sequence[Job]]) -> Mapping[int, Sequence[Job]]:
        """Give, when it is time to look which job runs, the groups that were there at the last look too."""
        if self._clock() - self._asked_at < GROUP_SECONDS / 2:
            return {}
        self._asked_at = self._clock()
        groups = {ticket: jobs for ticket, jobs in in_flight.items() if len(jobs) > 1}
        suspects = {ticket: jobs for ticket, jobs in groups.items() if ticket in self._known}
        self._known = set(groups)
        return suspects

    def behind(
        self, in_flight: Mapping[int, Sequence[Job]], running: Mapping[int, Job]
    ) -> dict[int, Sequence[Job]]:
        """Give the jobs that wait by the ticket of their task."""
        now = self._clock()
        self._seen_at = {ticket: self._seen_at.get(ticket, now) for ticket in running}
        last_begin_seconds = GROUP_SECONDS + CLOCKS_DIFFER_SECONDS
        stuck = [ticket for ticket, since in self._seen_at.items() if now - since >= last_begin_seconds]
        waiting = {ticket: _after(running[ticket], in_flight[ticket]) for ticket in stuck}
        return {ticket: jobs for ticket, jobs in waiting.items() if jobs}


def _after(job: Job, jobs: Sequence[Job]) -> Sequence[Job]:
    return jobs[list(jobs).index(job) + 1 :]
