"""Keeps a run's reservations alive while it runs."""

import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from djdist.job import Job
from djdist.job_store import JobStore

logger = logging.getLogger(__name__)


class Lease:
    """Renews reservations every quarter of the lease, in a thread of its own.

    It also rescues what dead runs left behind, so that a long run takes it over.

    Parameters
    ----------
    store : JobStore
        Holds the reservations.
    jobs : callable
        Gives the jobs to renew.
    seconds : float
        Length of the lease.
    """

    def __init__(self, store: JobStore, jobs: Callable[[], Sequence[Job]], seconds: float) -> None:
        self._store = store
        self._jobs = jobs
        self._period_seconds = seconds / 4
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="djdist-lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._over.wait(self._period_seconds):
            try:
                self._store.renew(self._jobs())
                self._store.rescue()
            except Exception as error:
                logger.warning("The lease could not be renewed, trying again: %s", error)
