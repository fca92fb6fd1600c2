"""Whether a key that was not made is tried again, and when."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from djdist._backoff import backoff_seconds
from djdist._job import Failure, Identity, Job, Policy, Recipe

LONGEST_PAUSE_SECONDS = 300.0
FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 30.0
MAX_TRANSIENT_ERRORS = 20
MAX_WAITS = 1000
"""How often a key may meet a worker that gets no connection, such as when the server is full."""
MAX_LOST_CONNECTIONS = 5
"""How often a key may lose its connection while it is made, or meet a limit of the server."""
MAX_SETUP_ERRORS = 20
LONGEST_BREAK_SECONDS = 30.0


@dataclass
class Retries:
    """Counts for each key of a run what went wrong.

    Each of its questions counts one more attempt and is answered with the seconds after
    which the key may be tried again, or None where it has had its tries.

    Parameters
    ----------
    recipes : mapping of str to Recipe
        How often the keys of each table are tried again, and after which errors.
    policy : Policy
        How many workers a key may lose, and how long the first pause is.
    """

    recipes: Mapping[str, Recipe]
    policy: Policy
    losses: Counter[Identity] = field(default_factory=Counter)
    _transient_errors: Counter[Identity] = field(default_factory=Counter)
    _failures: Counter[Identity] = field(default_factory=Counter)

    def after_loss(self, job: Job) -> float | None:
        """Its worker died."""
        self.losses[job.identity] += 1
        return 0.0 if self.losses[job.identity] < self.policy.max_worker_losses else None

    def forget(self, job: Job) -> None:
        """Keep nothing of a key that will not be tried again."""
        for counter in filter(None, (self.losses, self._transient_errors, self._failures)):
            counter.pop(job.identity, None)

    def after_transient_error(
        self, job: Job, *, begun: bool, hopeless: bool = False, blocked: bool = False
    ) -> float | None:
        """The database could not be used, or not even be reached to begin; ``hopeless``: maybe for good.

        Who is ``blocked`` by another session's lock is tried until that is gone.
        """
        self._transient_errors[job.identity] += 1
        tries = self._transient_errors[job.identity]
        most = MAX_LOST_CONNECTIONS if hopeless else MAX_TRANSIENT_ERRORS
        if not blocked and tries > (most if begun else MAX_WAITS):
            return None
        return backoff_seconds(tries, FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)

    def after_failure(self, job: Job, failure: Failure) -> float | None:
        """``make()`` raised."""
        recipe = self.recipes[job.table]
        if recipe.retry_on and not set(recipe.retry_on) & set(failure.kinds):
            return None
        self._failures[job.identity] += 1
        tries = self._failures[job.identity]
        if tries > recipe.retries:
            return None
        return backoff_seconds(tries, self.policy.retry_pause_seconds, LONGEST_PAUSE_SECONDS)


class CircuitBreaker:
    """Slows a run down whose workers can't begin what they get, so that one bad node doesn't use up the keys.

    A wave of them counts once, and whatever a worker has begun shows that there is a way.

    Parameters
    ----------
    clock : callable
        Seconds that pass.

    Attributes
    ----------
    last : str
        What stood in the way.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.last = ""
        self._clock = clock
        self._waves = 0
        self._over_at = clock()

    @property
    def retry_after_seconds(self) -> float:
        """For how long the run should submit nothing."""
        return max(0.0, self._over_at - self._clock())

    @property
    def tripped(self) -> bool:
        """Whether there have been too many in a row to go on."""
        return self._waves > MAX_SETUP_ERRORS

    def note(self, error: str) -> bool:
        """Note one more; return whether it begins a new wave."""
        self.last = error
        if self.retry_after_seconds:
            return False
        self._waves += 1
        seconds = backoff_seconds(self._waves, FIRST_RETRY_SECONDS, LONGEST_BREAK_SECONDS)
        self._over_at = self._clock() + seconds
        return True

    def reset(self) -> None:
        """Note that a worker has begun a key."""
        self._waves = 0
