"""Whether a key that was not made is tried again, and when."""

import random
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from djdist.job import Failure, Job, Policy

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 300.0
FIRST_DEFERRAL_SECONDS = 0.1
LONGEST_DEFERRAL_SECONDS = 30.0
MAX_DEFERRALS = 20
MAX_WAITS = 1000
"""So often a key may meet a worker that gets no connection, such as when the server is full."""
MAX_SPARES = 10
"""So often a key may be lost before it begins; then it counts as lost, or the run might never end."""


@dataclass
class Attempts:
    """Counts for each key of a run what went wrong.

    Each of its questions counts one more attempt and is answered with the seconds after
    which the key may be tried again, or None where it has had its tries.

    Parameters
    ----------
    policy : Policy
        How many tries there are.
    chance : random.Random
        Spreads the pauses, so that what failed together doesn't come back together.
    """

    policy: Policy
    chance: random.Random = field(default_factory=random.Random)
    losses: Counter[Hashable] = field(default_factory=Counter)
    _spares: Counter[Hashable] = field(default_factory=Counter)
    _deferrals: Counter[Hashable] = field(default_factory=Counter)
    _failures: Counter[Hashable] = field(default_factory=Counter)

    def may_be_spared(self, job: Job) -> bool:
        """Tell whether one more loss before the key began shall cost nothing."""
        self._spares[job.identity] += 1
        return self._spares[job.identity] <= MAX_SPARES

    def after_loss(self, job: Job) -> float | None:
        """Its worker died."""
        self.losses[job.identity] += 1
        return 0.0 if self.losses[job.identity] < self.policy.max_losses else None

    def forget(self, job: Job) -> None:
        """Keep nothing of a key that will not be tried again."""
        for counter in (self.losses, self._spares, self._deferrals, self._failures):
            counter.pop(job.identity, None)

    def after_deferral(self, job: Job, *, begun: bool) -> float | None:
        """The database could not be used, or not even be reached to begin."""
        self._deferrals[job.identity] += 1
        tries = self._deferrals[job.identity]
        if tries > (MAX_DEFERRALS if begun else MAX_WAITS):
            return None
        return self._pause(tries, FIRST_DEFERRAL_SECONDS, LONGEST_DEFERRAL_SECONDS)

    def after_failure(self, job: Job, failure: Failure) -> float | None:
        """``make()`` raised."""
        wanted = self.policy.retry_on
        if wanted and not set(wanted) & set(failure.kinds):
            return None
        self._failures[job.identity] += 1
        tries = self._failures[job.identity]
        if tries > self.policy.retries:
            return None
        return self._pause(tries, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)

    def _pause(self, tries: int, first_seconds: float, longest_seconds: float) -> float:
        """Double each time, up to a limit, with jitter [1]_.

        .. [1] M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
        """
        longest = min(longest_seconds, first_seconds * 2.0 ** (tries - 1))
        return self.chance.uniform(longest / 2, longest)
