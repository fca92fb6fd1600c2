"""Begins, makes and finishes one job; what its ``make()`` raises is an outcome."""

import logging
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from djdist._job import Ending, Identity, Job, Outcome
from djdist._signals import Signals, signal_behind
from djdist.database.errors import is_duplicate, is_infrastructure, is_lost, limit_of
from djdist.database.job_statements import Connection, JobStatements, key_values
from djdist.database.marks import worker_mark
from djdist.database.sessions import IDLE_LIMITS
from djdist.database.silence import bear
from djdist.database.watchdog import Waiting, blocker_of
from djdist.errors import LeaseLostError, Terminated
from djdist.pipeline.connection import close, reconnect
from djdist.shipping.packing import is_alive
from djdist.worker.failure import failure_of
from djdist.worker.make_session import MakeSession

if TYPE_CHECKING:
    from djdist.worker.group import WorkerContext

logger = logging.getLogger(__name__)

MADE = (Ending.MADE, Ending.ALREADY_MADE)

COMMIT_PATIENCE_SECONDS = 30.0
"""How long a worker tries to ask a database that went away at a COMMIT what became of it."""
PAUSE_SECONDS = 0.5

_left_behind: set[int] = set()


@dataclass(eq=False)
class Group:
    """Jobs of one task, which are begun together when the first of them is."""

    context: "WorkerContext"
    jobs: Sequence[Job]
    _begun: dict[Identity, bool] | None = None
    all_missing: bool = False

    @cached_property
    def _values(self) -> dict[Identity, dict[str, Any]]:
        backend = self.context.settings.backend
        worker = {"worker_host": platform.node(), "worker_pid": os.getpid()}
        return {job.identity: worker | key_values(job.key, backend) for job in self.jobs}

    def make_session(self, *, shares: bool = False) -> MakeSession:
        at, count = self.context, 1 if shares else len(self.jobs)
        return MakeSession(
            at.table, at.make_kwargs, at.version, count=count, fenced=at.statements is not None
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

    def finish(self, jobs: Sequence[Job], seconds: float) -> None:
        """Finish jobs in the transaction that made them, of which a keeper of jobs notes the mean time."""
        if statements := self.context.statements:
            values = [{**self.values(job), "seconds": seconds / len(jobs)} for job in jobs]
            statements.finish_all_or_undo(self.context.table.connection, values)

    def holds(self, job: Job) -> bool:
        """Return whether a job that was begun is still to be finished."""
        at = self.context
        return at.statements is not None and at.statements.holds(at.table.connection, self.values(job))

    def hand_back(self, connection: Any) -> None:
        """Undo the beginning of what is not finished, so that it costs the keys nothing."""
        if self.context.statements:
            self.context.statements.hand_back_begun(connection, list(self._values.values()))


def make_job(group: Group, job: Job, make_session: MakeSession, signals: Signals) -> Outcome:
    """Begin, make and finish one job."""
    started = time.monotonic()
    try:
        ending, failure = _attempt(group, job, make_session), None
    except LeaseLostError:
        ending, failure = Ending.LEASE_LOST, None
    except BaseException as latest:
        outcome = failed(group, job, latest, make_session, signals, time.monotonic() - started)
        ending, failure = outcome.ending, outcome.failure
    if ending not in MADE and not make_session.is_nested:  # else the connection is still in use
        leave_behind(group.context)
    return Outcome(job, ending, failure, platform.node(), os.getpid())


def failed(
    group: Group, job: Job, latest: BaseException, make_session: MakeSession, signals: Signals, seconds: float
) -> Outcome:
    """Return what has become of a job over which something is being raised after some seconds."""
    error = (signals.received and signal_behind(latest)) or latest
    failure = failure_of(error)
    if failure.blocked:
        blocker = blocker_of(group.context.table.connection._conn)
        failure = replace(failure, message=f"{failure.message} {blocker}".strip())
    if is_lost(error) and not failure.limit and not make_session.is_nested:
        limit = _limit_of_idling(group.context.table.connection, seconds)
        failure = replace(failure, limit=limit)
    ending = _ending(error, interrupted=signals.received)
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


def leave_behind(context: "WorkerContext") -> None:
    """Have the next key get a connection that holds nothing of those before."""
    _left_behind.add(id(context.table.connection))
    if context.own_connection:
        close(context.table.connection)


def ready_connection(context: "WorkerContext") -> None:
    """Reconnect after what was not made."""
    connection = context.table.connection
    if id(connection) in _left_behind:
        if context.own_connection or not is_alive(connection):
            reconnect(connection)
        _left_behind.discard(id(connection))


def _attempt(group: Group, job: Job, make_session: MakeSession) -> Ending:
    table, statements = group.context.table, group.context.statements
    ready_connection(group.context)
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
        if make_session.committing and is_infrastructure(error) and was_committed(group, [job]):
            return Ending.MADE
        if not (missing and is_duplicate(error) and job.key in table):
            raise
    finish(make_session.session)
    return Ending.ALREADY_MADE


def was_committed(group: Group, jobs: Sequence[Job]) -> bool:
    """Ask the database whether it did a COMMIT of these jobs whose answer was lost.

    All are asked for, since others may have made some of them where there is no jobs table.
    """
    context, give_up_at = group.context, time.monotonic() + COMMIT_PATIENCE_SECONDS
    logger.warning("The answer to the COMMIT of %s was lost; asking whether it was done", jobs[-1])
    connection = context.table.connection
    while True:
        try:
            if context.own_connection or not is_alive(connection):
                reconnect(connection)
            return not any(map(group.holds, jobs)) and all(job.key in context.table for job in jobs)
        except Exception:
            if time.monotonic() > give_up_at:
                return False
            time.sleep(PAUSE_SECONDS)


def _ending(error: BaseException, *, interrupted: bool) -> Ending:
    if isinstance(error, Terminated) or (interrupted and isinstance(error, KeyboardInterrupt | SystemExit)):
        return Ending.INTERRUPTED
    return Ending.TRANSIENT if is_infrastructure(error) or limit_of(error) else Ending.FAILED
