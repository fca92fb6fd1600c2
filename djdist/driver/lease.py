"""Keeps a run's reservations alive while it runs."""

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

from djdist._job_store import JobStore
from djdist._notifier import Notifier
from djdist.driver.tasks import Task

logger = logging.getLogger(__package__)

LONGEST_RENEWAL_SECONDS = 1.0
LONGEST_END_SECONDS = 10.0


class Lease:
    """Renews reservations every quarter of the lease, in a thread of its own.

    It also rescues what dead runs left behind, so that a long run takes it over, and
    notes on each task whether it is still this run's.

    Parameters
    ----------
    store : JobStore
        Holds the reservations.
    tasks : iterable of Task
        Those in flight, whenever it is asked.
    seconds : float
        Length of the lease.
    over : threading.Event
        Tells that the run is over; it is set when the lease is left.
    notifier : Notifier, optional
        Is told when the database can't be reached.

    Attributes
    ----------
    has_lost : bool
        The latest renewal found tasks that are lost, which spares a look at thousands of them per step.
    """

    def __init__(
        self,
        store: JobStore,
        tasks: Iterable[Task],
        seconds: float,
        over: threading.Event,
        notifier: Notifier | None = None,
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._period_seconds = seconds / 4
        self._over = over
        self._notifier = notifier or Notifier()
        self.has_lost = False
        self._renewing = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="djdist-lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(LONGEST_END_SECONDS)  # longer than a store waits for what nobody wants any more

    @contextmanager
    def held_off(self) -> Iterator[None]:
        """Keep renewals from locking jobs for a ``with``, unless one waits for its database."""
        held = self._renewing.acquire(timeout=LONGEST_RENEWAL_SECONDS)
        try:
            yield
        finally:
            if held:
                self._renewing.release()

    def _keep(self) -> None:
        while not self._over.wait(self._period_seconds):
            try:
                with self._renewing:
                    self._renew(list(self._tasks))
                self._store.rescue()
            except Exception as error:
                if self._over.is_set():
                    return
                logger.warning("The lease could not be renewed, trying again: %s", error)
                self._notifier.unreachable(str(error))

    def _renew(self, tasks: list[Task]) -> None:
        kept = {job.identity for job in self._store.renew([job for task in tasks for job in task.jobs])}
        for task in tasks:
            task.note_renewal(kept)
        self.has_lost = any(task.is_lost for task in tasks)
