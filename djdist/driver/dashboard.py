"""What the log and the cluster's dashboard show of a run."""

import logging
from collections.abc import Callable

from djdist._job import Status
from djdist.driver.backlog import Backlog
from djdist.driver.context import RunContext

logger = logging.getLogger(__package__)

RECOUNT_SECONDS = 2.0
TELL_SECONDS = 1.0
SHOWN_RECOUNT_SECONDS = 15.0


class Dashboard:
    """Tells the log when the number of slots changes, and the cluster's dashboard the counts."""

    def __init__(self, run: RunContext, backlog: Backlog, status: Callable[[], Status]) -> None:
        self._pool, self._name, self._clock = run.pool, run.name, run.clock
        self._backlog = backlog
        self._status = status
        self._slots = 0
        self._told_at = float("-inf")
        self._make_seconds: list[float] = []

    def note(self, make_seconds: float) -> None:
        """Note how long a task took for a key."""
        if self._pool.has_dashboard:
            self._make_seconds.append(make_seconds)

    def tell(self) -> None:
        """Tell both, unless they were told so shortly ago."""
        if self._clock() - self._told_at < TELL_SECONDS:
            return
        self._told_at = self._clock()
        self._tell_slots(self._pool.slots())
        if self._pool.has_dashboard:
            self._backlog.count(SHOWN_RECOUNT_SECONDS)
        self.show()

    def show(self) -> None:
        """Show on the cluster's dashboard how the run stands."""
        self._pool.show(self._name, self._status(), tuple(self._make_seconds))
        self._make_seconds.clear()

    def _tell_slots(self, slots: int) -> None:
        if slots != self._slots and logger.isEnabledFor(logging.INFO):
            pending = self._backlog.count(RECOUNT_SECONDS)
            if not self._backlog.is_counted:  # next time it may be
                return
            logger.info(
                "%s has %d slots, %d before; %d keys are pending", self._name, slots, self._slots, pending
            )
        self._slots = slots
