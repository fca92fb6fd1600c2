"""Keeps a run's reservations alive while it runs."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from djdist._job import Job
from djdist._job_store import JobStore

logger = logging.getLogger(__package__)

LONGEST_RENEWAL_SECONDS = 1.0
LONGEST_END_SECONDS = 10.0


class Lease:
    """Renews reservations every quarter of the lease, in a thread of its own.

    It also rescues what dead runs left behind, so that a long run takes it over, and
    remembers which jobs others have taken over from this run.

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
        self._missing: dict[int, Job] = {}
        self._gone: dict[int, Job] = {}
        self._over = threading.Event()
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
        """Let no renewal lock jobs meanwhile, unless one waits for its database."""
        held = self._renewing.acquire(timeout=LONGEST_RENEWAL_SECONDS)
        try:
            yield
        finally:
            if held:
                self._renewing.release()

    @property
    def is_over(self) -> bool:
        """Tell whether it renews no more."""
        return self._over.is_set()

    @property
    def any_gone(self) -> bool:
        """Tell whether any job may be somebody else's."""
        return bool(self._gone)

    def is_gone(self, job: Job) -> bool:
        """Tell whether a job that is still in flight is somebody else's by now.

        One that is missing for the first time may have been finished just then; and a key
        that was reserved once more is another job.
        """
        return id(job) in self._gone

    def _keep(self) -> None:
        while not self._over.wait(self._period_seconds):
            try:
                with self._renewing:
                    self._renew(self._jobs())
                self._store.rescue()
            except Exception as error:
                if self._over.is_set():
                    return
                logger.warning("The lease could not be renewed, trying again: %s", error)

    def _renew(self, jobs: Sequence[Job]) -> None:
        kept = {job.identity for job in self._store.renew(jobs)}
        missing = {id(job): job for job in jobs if job.identity not in kept}
        self._gone = {key: job for key, job in missing.items() if key in self._missing}
        self._missing = missing
