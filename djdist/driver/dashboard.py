"""What the log and the executor's dashboard show of a run."""

import logging
from collections.abc import Callable

from djdist._executor import Executor
from djdist._job import Status
from djdist.driver.supply import Supply

logger = logging.getLogger(__package__)

RECOUNT_SECONDS = 2.0
TELL_SECONDS = 1.0
SHOWN_RECOUNT_SECONDS = 15.0


class Dashboard:
    """Lets the log know when the number of places changes, and the executor's dashboard the counts."""

    def __init__(
        self,
        executor: Executor,
        supply: Supply,
        table: str,
        clock: Callable[[], float],
        status: Callable[[], Status],
    ) -> None:
        self._executor = executor
        self._supply = supply
        self._table = table
        self._clock = clock
        self._status = status
        self._places = 0
        self._told_at = float("-inf")
        self._make_seconds: list[float] = []

    def note(self, make_seconds: float) -> None:
        """Note how long a task took for a key."""
        if self._executor.shows:
            self._make_seconds.append(make_seconds)

    def tell(self) -> None:
        """Let both know, unless they were told so shortly ago."""
        if self._clock() - self._told_at < TELL_SECONDS:
            return
        self._told_at = self._clock()
        self._tell_places(self._executor.places())
        if self._executor.shows:
            self._supply.count(SHOWN_RECOUNT_SECONDS)
        self.show()

    def show(self) -> None:
        """Let the executor's dashboard show how the run stands."""
        self._executor.show(self._table, self._status(), tuple(self._make_seconds))
        self._make_seconds.clear()

    def _tell_places(self, places: int) -> None:
        if places != self._places and logger.isEnabledFor(logging.INFO):
            pending = self._supply.count(RECOUNT_SECONDS)
            if not self._supply.is_counted:  # next time it may be
                return
            logger.info(
                "%s has %d places, %d before; %d keys are pending", self._table, places, self._places, pending
            )
        self._places = places
