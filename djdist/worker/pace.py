"""How many keys of a table share a transaction in this process."""

import logging
import time
from collections.abc import Callable

from djdist._job import SHARED_SECONDS

logger = logging.getLogger(__name__)

FIRST = 8
SINGLE_SECONDS = 30.0


class Pace:
    """Grows from few keys to as many as fit into half a second.

    Parameters
    ----------
    most : int
        How many keys may share a transaction at most; 1 gives each its own.
    clock : callable
        Seconds that pass.

    Attributes
    ----------
    size : int
        How many keys should share the next transaction.
    """

    def __init__(self, most: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._single_until = float("-inf")
        self.size = min(FIRST, most)

    @property
    def shares(self) -> bool:
        """Whether keys share transactions now."""
        return self._most > 1 and self._clock() >= self._single_until

    def made(self, count: int, seconds: float) -> None:
        """Note how long keys took that were made together."""
        fitting = int(SHARED_SECONDS * count / max(seconds, 1e-9))
        self.size = max(1, min(2 * self.size, self._most, fitting))

    def undone(self) -> None:
        """Begin with few keys again."""
        self.size = min(FIRST, self._most)

    def in_conflict(self, reason: str) -> None:
        """Give each key its own transaction for a while, because others were in the way of the shared one."""
        self.undone()
        self._single_until = self._clock() + SINGLE_SECONDS
        logger.info("Each key has a transaction of its own for %g s: %s", SINGLE_SECONDS, reason)

    def end(self) -> None:
        """Give each key its own transaction from now on."""
        self._most = self.size = 1
