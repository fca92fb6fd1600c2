"""What the log and the cluster's dashboard show of a run."""

import logging
from collections import defaultdict
from collections.abc import Callable

from djdist._job import Status
from djdist.driver.context import RunContext
from djdist.driver.tables import Tables

logger = logging.getLogger(__package__)

RECOUNT_SECONDS = 2.0
TELL_SECONDS = 1.0
SHOWN_RECOUNT_SECONDS = 15.0


class Dashboard:
    """Tells the log when the number of slots changes, and the cluster's dashboard the counts."""

    def __init__(
        self, run: RunContext, tables: Tables, slots: Callable[[], int], status: Callable[[], Status]
    ) -> None:
        self._pool, self._name, self._clock = run.pool, run.name, run.clock
        self._tables = tables
        self._count_slots = slots
        self._status = status
        self._slots = 0
        self._told_at = float("-inf")
        self._make_seconds: dict[str, list[float]] = defaultdict(list)

    def note(self, table: str, make_seconds: float) -> None:
        """Note how long a task took for a key."""
        if self._pool.has_dashboard:
            self._make_seconds[table].append(make_seconds)

    def tell(self) -> None:
        """Tell both, unless they were told so shortly ago."""
        if self._clock() - self._told_at < TELL_SECONDS:
            return
        self._told_at = self._clock()
        self._tell_slots(self._count_slots())
        if self._pool.has_dashboard:
            self._tables.count(SHOWN_RECOUNT_SECONDS)
        self.show()

    def show(self) -> None:
        """Show on the cluster's dashboard how the run stands."""
        for table, counts in self._status().tables.items():
            self._pool.show(table, counts, tuple(self._make_seconds.pop(table, ())))

    def _tell_slots(self, slots: int) -> None:
        if slots != self._slots and logger.isEnabledFor(logging.INFO):
            pending = self._tables.count(RECOUNT_SECONDS)
            if not self._tables.is_counted:  # next time it may be
                return
            logger.info(
                "%s has %d slots, %d before; %d keys are pending", self._name, slots, self._slots, pending
            )
        self._slots = slots
