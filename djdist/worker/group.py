"""Makes the keys of one task and finishes their jobs; what a ``make()`` raises is an outcome."""

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from djdist._job import GROUP_SECONDS, Ending, Job, Outcome, Report
from djdist._signals import Signals, catching
from djdist.database.dbapi import ConnectionSettings
from djdist.database.job_statements import JobStatements
from djdist.database.watchdog import watched
from djdist.errors import Terminated
from djdist.shipping.packing import open_dbapi_connection
from djdist.worker.failure import failure_of
from djdist.worker.key_needs import needs_of
from djdist.worker.make_job import MADE, Group, make_job
from djdist.worker.make_session import MakeSession, is_making
from djdist.worker.memory import measured
from djdist.worker.pace import Pace
from djdist.worker.sharing import Limit, make_in_shared_transactions
from djdist.worker.trial import trial

THREADS = (
    "A worker process with several threads makes one key at a time, because a DataJoint connection serves "
    "one thread: give workers one thread each (Dask: threads_per_worker=1, or --nthreads 1)."
)

_lock = threading.RLock()  # the keys that a make() populates itself are made in its thread
made_for_others: list[Group] = []
"""What this process makes as a worker."""


@dataclass(frozen=True)
class WorkerContext:
    """A table and what belongs to it, ready in this process.

    Where the connection is the worker's own, it is closed after all that was not made, and the
    next key gets a new one: what was left behind, such as locks, must not meet any key. The pace says
    how many keys share a transaction.
    """

    table: Any
    make_kwargs: dict[str, Any]
    settings: ConnectionSettings
    version: str = ""
    statements: JobStatements | None = None
    own_connection: bool = False
    pace: Pace = field(default_factory=Pace)

    def __call__(self, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs in the process of the caller, with the caller's own table.

        On a worker the caller is what it makes: a thread of that make() which waits for this one.
        """
        with nullcontext() if made_for_others else one_at_a_time():
            if not jobs:
                return trial(self.table, self.statements)
            if jobs[0].asks:
                return needs_of(self.table, jobs)
            return make_group(Group(self, jobs))

    def watched(self) -> AbstractContextManager[None]:
        """Notice if the server of the table's connection falls silent, for a ``with``."""
        return watched(self.table.connection, partial(open_dbapi_connection, self.settings))


def make_group(group: Group, limit: Limit = nullcontext) -> Report:
    """Make jobs one after the other until one is not made, or they take long; what is left has not begun."""
    outcomes, received, started = list[Outcome](), None, time.monotonic()
    shares = group.context.pace.shares and len(group.jobs) > 1 and not is_making()
    make = make_in_shared_transactions if shares else _make_one_by_one
    with measured() as peak, catching(signal.SIGINT, signal.SIGTERM) as signals, group.context.watched():
        try:
            with group.make_session(shares=shares) as make_session:
                for ended in make(group, make_session, signals, limit):
                    outcomes += ended
                    if ended[-1].ending not in MADE or time.monotonic() - started > GROUP_SECONDS:
                        break
        except KeyboardInterrupt as error:  # between two keys
            received, failure = signal.SIGINT, failure_of(error)
        except Terminated as error:
            received, failure = signal.SIGTERM, failure_of(error)
    ended_jobs = {outcome.job.identity for outcome in outcomes}
    left = [job for job in group.jobs if job.identity not in ended_jobs]
    if received and not left:
        signal.raise_signal(received)
    elif received:
        outcomes.append(Outcome(left.pop(0), Ending.INTERRUPTED, failure))
    outcomes += [Outcome(job, Ending.NOT_STARTED) for job in left]
    return Report(tuple(outcomes), seconds=time.monotonic() - started, peak_memory=peak.bytes)


def _make_one_by_one(
    group: Group, make_session: MakeSession, signals: Signals, limit: Limit
) -> Iterator[list[Outcome]]:
    for job in group.jobs:
        with limit():
            outcome = make_job(group, job, make_session, signals)
        yield [outcome]


def _warn_and_wait(lock: Any) -> None:
    warnings.warn(THREADS, stacklevel=5)
    lock.acquire()


@contextmanager
def one_at_a_time(await_turn: Callable[[Any], None] = _warn_and_wait) -> Iterator[None]:
    """One make() at a time in a process: DataJoint's connection serves one thread.

    Where another thread has the lock, ``await_turn`` is given it to acquire it.
    """
    # tried without waiting first, so that whoever does have to wait can warn, or free a slot of the cluster
    if not _lock.acquire(blocking=False):
        await_turn(_lock)
    try:
        yield
    finally:
        _lock.release()
