"""Which keys share a task, and how many."""

from collections.abc import Callable, Iterator, Sequence

from djdist._job import Identity, Job

LARGEST = 500
GROWTH = 8
SHARES = 2
"""Near the end, a slot gets its fair share of what is left in this many groups."""
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
        """Note how long a worker took for some keys, and whether one that failed cut the group short."""
        if count and seconds:
            latest = seconds / count
            self._seconds = (self._seconds + latest) / 2 if self._seconds else latest
            fitting = int(min(self._task_seconds / self._seconds, LARGEST))
            before = count if cut else max(count, self.size // GROWTH)
            self.size = max(1, min(fitting, GROWTH * before))

    def isolate(self, jobs: Sequence[Job]) -> None:
        """Make each of these in a task of its own next, because one of them may have killed their worker."""
        if len(jobs) > 1:
            self._alone |= {job.identity for job in jobs}

    def size_of_shares(self, left: Callable[[int], int], slots: int) -> int:
        """Return the size, smaller where little is left, so that all slots end about together [2]_.

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
        """Divide jobs into groups of a size, or one per slot if there are fewer jobs."""
        alone = [job for job in jobs if job.identity in self._alone]
        others = [job for job in jobs if job.identity not in self._alone] if alone else jobs
        self._alone -= {job.identity for job in alone}
        yield from ((job,) for job in alone)
        size = max(1, min(size, -(-len(others) // slots)))
        yield from (tuple(others[first : first + size]) for first in range(0, len(others), size))
