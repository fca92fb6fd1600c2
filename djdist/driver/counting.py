"""How much is left, counted in a thread of its own."""

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__package__)

Count = TypeVar("Count")

SHORT_SECONDS = 0.02
"""Most counts take less, and the loop waits no longer for one."""
SHARE = 40
"""Between two counts passes this many times what one takes, so that the database's load stays low."""


class Counting(Generic[Count]):
    """Counts in a thread of its own, so that no loop waits for what takes long.

    Parameters
    ----------
    count : callable
        Counts.
    clock : callable
        Seconds that pass.
    """

    def __init__(self, count: Callable[[], Count], clock: Callable[[], float]) -> None:
        self._count = count
        self._clock = clock
        self._ended_at, self._took_seconds = float("-inf"), 0.0
        self._thread: threading.Thread | None = None
        self._found: Count | None = None

    def found(self, age_seconds: float) -> Count | None:
        """Return, once, what was found since; begin a new count unless one ended so shortly ago."""
        pause_seconds = max(age_seconds, SHARE * self._took_seconds)
        if self._thread is None and self._clock() - self._ended_at >= pause_seconds:
            self._thread = threading.Thread(target=self._keep, name="djdist-count", daemon=True)
            self._thread.start()
            self._thread.join(SHORT_SECONDS)
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread = None
        return self._found

    def _keep(self) -> None:
        began_at, self._found = self._clock(), None
        try:
            self._found = self._count()
        except Exception as error:
            logger.debug("What is left could not be counted: %s", error)
        self._ended_at = self._clock()
        self._took_seconds = self._ended_at - began_at
