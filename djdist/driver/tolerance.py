"""What a run that watches bears: a table that its database refuses is left alone, the others go on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from djdist._job import Policy
from djdist._notifier import Notifier
from djdist.driver.shutdown import Shutdown
from djdist.driver.tables import TableJobs
from djdist.errors import DatabaseError

REFUSED = "The database refuses a table, which is left alone"

logger = logging.getLogger(__package__)


class Tolerance:
    """Leaves tables alone whose jobs can't be read or changed, in a run that watches.

    Such as after a table was dropped or altered. In another run the error is passed on.

    Parameters
    ----------
    policy : Policy
        Whether the run watches.
    shutdown : Shutdown
        A run that is to end bears nothing.
    notifier : Notifier
        Is told of it.
    """

    def __init__(self, policy: Policy, shutdown: Shutdown, notifier: Notifier) -> None:
        self._policy = policy
        self._shutdown = shutdown
        self._notifier = notifier
        self._told: dict[str, str] = {}

    @contextmanager
    def of(self, table: TableJobs) -> Iterator[None]:
        """Do something with a table's jobs, and go on where its database refuses it."""
        try:
            yield
        except DatabaseError as error:
            if not self._policy.watches or self._shutdown.is_stopping or not self._shutdown.is_patient:
                raise
            table.is_refused = True
            table.backlog.found_empty()
            self._tell(table.name, str(error))

    def _tell(self, table: str, trouble: str) -> None:
        if self._told.get(table) != trouble:  # the same trouble comes with each look
            self._told[table] = trouble
            logger.warning("%s is left alone until its database accepts it again: %s", table, trouble)
            self._notifier.unreachable(f"{table}: {trouble}", REFUSED)
