"""Makes the keys of one task and finishes their jobs; what a ``make()`` raises is an outcome."""

import logging
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from djdist._job import GROUP_SECONDS, Ending, Identity, Job, Outcome, Report
from djdist._signals import Signals, catching, signal_behind
from djdist.database.dbapi import ConnectionSettings
from djdist.database.errors import is_duplicate, is_infrastructure, is_lost, limit_of
from djdist.database.job_statements import Connection, JobStatements, key_values
from djdist.database.marks import worker_mark
from djdist.database.sessions import IDLE_LIMITS
from djdist.database.silence import bear
from djdist.database.watchdog import Waiting, blocker_of, watched
from djdist.errors import LeaseLostError, Terminated
from djdist.pipeline.connection import close, reconnect
from djdist.shipping.packing import is_alive, open_dbapi_connection
from djdist.worker.failure import failure_of
from djdist.worker.key_needs import needs_of
from djdist.worker.make_session import MakeSession
from djdist.worker.memory import measured
from djdist.worker.trial import trial

logger = logging.getLogger(__name__)

MADE = (Ending.MADE, Ending.ALREADY_MADE)
THREADS = (
    "A worker process with several threads makes one key at a time, because a DataJoint connection serves "
    "one thread: give workers one thread each (Dask: threads_per_worker=1, or --nthreads 1)."
)

COMMIT_PATIENCE_SECONDS = 30.0
"""How long a worker tries to ask a database that went away at a COMMIT what became of it."""
PAUSE_SECONDS = 0.5

_left_behind: set[int] = set()
_lock = threading.RLock()  # the keys that a make() populates itself are made in its thread
made_for_others: list["Group"] = []
"""What this process makes as a worker."""


@dataclass(frozen=True)
class WorkerContext:
    """A table and what belongs to it, ready in this process.

    Where the connection is the worker's own, it is closed after all that was not made, and the
    next key gets a new one: what was left behind, such as locks, must not meet any key.
    """

    table: Any
    make_kwargs: dict[str, Any]
    settings: ConnectionSettings
    version: str = ""
    statements: JobStatements | None = None
    own_connection: bool = False

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


@dataclass(eq=False)
class Group:
    """Jobs of one task, which are begun together when the first of them is."""

    context: WorkerContext
    jobs: Sequence[Job]
    _values: dict[Identity, dict[str, Any]] = field(init=False)
    _begun: dict[Identity, bool] | None = None
    all_missing: bool = False

    def __post_init__(self) -> None:
        backend = self.context.settings.backend
        worker = {"worker_host": platform.node(), "worker_pid": os.getpid()}
        self._values = {job.identity: worker | key_values(job.key, backend) for job in self.jobs}

    def make_session(self) -> MakeSession:
        at = self.context
        return MakeSession(
            at.table, at.make_kwargs, at.version, count=len(self.jobs), fenced=at.statements is not None
        )

    def values(self, job: Job) -> dict[str, Any]:
        return self._values[job.identity]

    def begins(self, job: Job) -> bool:
        statements = self.context.statements
        if statements is None:
            return True
        if self._begun is None:
            self._bear_mark(statements)
            begun = statements.begins(self.context.table.connection, list(self._values.values()))
            self._begun = dict(zip(self._values, begun, strict=True))
            self.all_missing = not statements.any_made(
                self.context.table.connection, [*self._values.values()]
            )
        return self._begun[job.identity]

    def _bear_mark(self, statements: JobStatements) -> None:
        """Mark a worker's session, so that it can be found and ended if the worker loses power."""
        if self.context.own_connection:
            session = self.context.table.connection._conn
            with Waiting(session):
                bear(session, worker_mark(statements.token, platform.node(), os.getpid()))

    def holds(self, job: Job) -> bool:
        """Return whether a job that was begun is still to be finished."""
        at = self.context
        return at.statements is not None and at.statements.holds(at.table.connection, self.values(job))

    def hand_back(self, connection: Any) -> None:
        """Undo the beginning of what is not finished, so that it costs the keys nothing."""
        if self.context.statements:
            self.context.statements.hand_back_begun(connection, list(self._values.values()))


def make_group(group: Group, limit: Callable[[], AbstractContextManager[None]] = nullcontext) -> Report:
    """Make jobs one after the other until one is not made, or they take long; what is left has not begun."""
    jobs, outcomes, received = group.jobs, list[Outcome](), None
    started = time.monotonic()
    with measured() as peak, catching(signal.SIGINT, signal.SIGTERM) as signals, group.context.watched():
        try:
            with group.make_session() as make_session:
                for job in jobs:
                    with limit():
                        outcomes.append(make_job(group, job, make_session, signals))
                    if outcomes[-1].ending not in MADE or time.monotonic() - started > GROUP_SECONDS:
                        break
        except KeyboardInterrupt as error:  # between two keys
            received, failure = signal.SIGINT, failure_of(error)
        except Terminated as error:
            received, failure = signal.SIGTERM, failure_of(error)
    if received and len(outcomes) == len(jobs):
        signal.raise_signal(received)
    elif received:
        outcomes.append(Outcome(jobs[len(outcomes)], Ending.INTERRUPTED, failure))
    left = tuple(Outcome(job, Ending.NOT_STARTED) for job in jobs[len(outcomes) :])
    return Report((*outcomes, *left), seconds=time.monotonic() - started, peak_memory=peak.bytes)


def make_job(group: Group, job: Job, make_session: MakeSession, signals: Signals) -> Outcome:
    """Begin, make and finish one job."""
    started = time.monotonic()
    try:
        ending, failure = _attempt(group, job, make_session), None
    except LeaseLostError:
        ending, failure = Ending.LEASE_LOST, None
    except BaseException as latest:
        error = (signals.received and signal_behind(latest)) or latest
        ending, failure = _ending(error, interrupted=signals.received), failure_of(error)
        if failure.blocked:
            blocker = blocker_of(group.context.table.connection._conn)
            failure = replace(failure, message=f"{failure.message} {blocker}".strip())
        if is_lost(error) and not failure.limit and not make_session.is_nested:
            limit = _limit_of_idling(group.context.table.connection, time.monotonic() - started)
            failure = replace(failure, limit=limit)
    if ending not in MADE and not make_session.is_nested:  # else the connection is still in use
        _leave_behind(group.context)
    return Outcome(job, ending, failure, platform.node(), os.getpid())


def _limit_of_idling(connection: Any, seconds: float) -> str:
    """Return the setting by which the server may have ended a session that was idle for that time."""
    with suppress(Exception):
        if not is_alive(connection):
            reconnect(connection)
        for setting, longest in connection.query(IDLE_LIMITS[connection.adapter.backend]).fetchall():
            if seconds >= longest:
                return str(setting)
    return ""


def _leave_behind(context: WorkerContext) -> None:
    _left_behind.add(id(context.table.connection))
    if context.own_connection:
        close(context.table.connection)


def _attempt(group: Group, job: Job, make_session: MakeSession) -> Ending:
    context = group.context
    table, statements = context.table, context.statements
    if id(table.connection) in _left_behind:
        if context.own_connection or not is_alive(table.connection):
            reconnect(table.connection)
        _left_behind.discard(id(table.connection))
    if not group.begins(job):
        return Ending.MADE if job.key in table else Ending.LEASE_LOST  # a cluster may run a task again
    started = time.monotonic()

    def finish(connection: Connection) -> None:
        if statements:
            values = {**group.values(job), "seconds": time.monotonic() - started}
            statements.finish_or_undo(connection, values)

    missing = group.all_missing and not make_session.has_populated
    try:
        if make_session(job.key, finish, is_missing=missing):
            return Ending.MADE
    except Exception as error:
        if make_session.committing and is_infrastructure(error) and _was_committed(group, job):
            return Ending.MADE
        if not (missing and is_duplicate(error) and job.key in table):
            raise
    finish(make_session.session)
    return Ending.ALREADY_MADE


def _was_committed(group: Group, job: Job) -> bool:
    """Ask the database whether it did a COMMIT whose answer was lost."""
    context, give_up_at = group.context, time.monotonic() + COMMIT_PATIENCE_SECONDS
    logger.warning("The answer to the COMMIT of %s was lost; asking whether it was done", job)
    connection = context.table.connection
    while True:
        try:
            if context.own_connection or not is_alive(connection):
                reconnect(connection)
            return not group.holds(job) and job.key in context.table
        except Exception:
            if time.monotonic() > give_up_at:
                return False
            time.sleep(PAUSE_SECONDS)


def _ending(error: BaseException, *, interrupted: bool) -> Ending:
    if isinstance(error, Terminated) or (interrupted and isinstance(error, KeyboardInterrupt | SystemExit)):
        return Ending.INTERRUPTED
    return Ending.TRANSIENT if is_infrastructure(error) or limit_of(error) else Ending.FAILED


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
