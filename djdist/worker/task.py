"""What travels to workers, and how they make keys with it."""

import faulthandler
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from djdist._job import Ending, Job, Outcome, Report
from djdist.database.dbapi import ConnectionSettings
from djdist.database.errors import is_full, is_infrastructure, is_unreachable
from djdist.database.job_statements import JobStatements
from djdist.database.watchdog import watch
from djdist.errors import Terminated
from djdist.pipeline.connection import reconnect
from djdist.shipping.assignments import Assignment, assigned
from djdist.shipping.packing import open_dbapi_connection, unpack
from djdist.worker.failure import failure_of, portable
from djdist.worker.group import WorkerContext, made_for_others, make_group, one_at_a_time
from djdist.worker.key_needs import needs_of
from djdist.worker.make_job import Group
from djdist.worker.make_session import load_early
from djdist.worker.pace import Pace
from djdist.worker.session import Session
from djdist.worker.trial import setup_error, trial

EXIT_CODE_OF_SIGTERM = 128 + signal.SIGTERM
OVERDUE_FACTOR = 1.2
OVERDUE_SECONDS = 5.0


@dataclass
class WorkerTask:
    """All that workers need to make the keys of one table in one run.

    What it holds of credentials and of the user's code doesn't show when printed. A process keeps
    one for a run, and in it the table, unpacked.

    Parameters
    ----------
    name : str
        The table's name, for messages.
    settings : ConnectionSettings
        How to connect, and DataJoint's settings.
    pickled : bytes
        The pickled table and arguments of ``make()``.
    version : str
        The code's version.
    statements : JobStatements or None
        Statements on the jobs table; None where a run has none.
    preload : tuple of str
        Modules to import first.
    timeout_seconds : float or None
        How long a ``make()`` may take.
    keys_per_transaction : int
        How many keys may share a transaction at most.
    shared : ConnectionSettings or None
        Settings of ``dj.config`` and ``dj.conn()``, where the table has a connection of its own.
    """

    name: str
    settings: ConnectionSettings = field(repr=False)
    pickled: bytes = field(repr=False)
    version: str = ""
    statements: JobStatements | None = field(default=None, repr=False)
    preload: tuple[str, ...] = ()
    timeout_seconds: float | None = None
    keys_per_transaction: int = 1
    shared: ConnectionSettings | None = field(default=None, repr=False)
    _context: WorkerContext | None = field(default=None, init=False, repr=False, compare=False)
    _assignments: list[Assignment] = field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(self, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs on a worker; what comes back can be pickled."""
        with one_at_a_time():
            try:
                context = self._unpacked()
            except Exception as error:
                return _without_context(self.name, jobs, error)
            if not jobs:
                return trial(context.table, context.statements)
            if jobs[0].asks:
                return needs_of(context.table, jobs)
            group = Group(context, jobs)
            made_for_others.append(group)
            try:
                with assigned(self._assignments):
                    report = make_group(group, self._limit)
            finally:
                made_for_others.remove(group)
            _exit_if_terminated(group, report)
            return replace(report, outcomes=tuple(map(_portable, report.outcomes)))

    def _unpacked(self) -> WorkerContext:
        """Unpack the table when it is first needed, and let go of the bytes, which may be many."""
        if self._context is None:
            _allow_children()
            load_early()
            table, make_kwargs, self._assignments = unpack(
                self.pickled, self.settings, self.shared, self.preload
            )
            # for as long as the worker lives: its next run begins with the question whether this one does
            watch(table.connection, partial(open_dbapi_connection, self.settings))
            self._context = WorkerContext(
                table,
                make_kwargs,
                self.settings,
                self.version,
                self.statements,
                own_connection=True,
                pace=Pace(self.keys_per_transaction),
            )
            self.pickled = b""
        return self._context

    def _limit(self) -> AbstractContextManager[None]:
        if self.timeout_seconds is None:
            return nullcontext()
        return _ending_itself(self.timeout_seconds, watched=self.statements is not None)


def give_back_and_exit(*, end_process: bool) -> None:
    """Give back what this process is making, and exit if it is a worker's own."""
    for group in made_for_others.copy():
        with suppress(Exception), _opened(group.context.settings) as connection:
            group.hand_back(connection)
        if end_process:
            # not sys.exit(): the thread that makes the key would go on until it is done
            os._exit(EXIT_CODE_OF_SIGTERM)


@contextmanager
def _opened(settings: ConnectionSettings) -> Iterator[Session]:
    """Open another connection than DataJoint's, which the thread that makes keys is using."""
    connection = open_dbapi_connection(settings)
    yield Session(connection)
    connection.commit()


def _exit_if_terminated(group: Group, report: Report) -> None:
    """End this process if it was told to, with its jobs given back so that this costs the keys nothing."""
    if not any(isinstance(o.failure.exception, Terminated) for o in report.outcomes if o.failure):
        return
    connection = group.context.table.connection
    with suppress(Exception):
        reconnect(connection)
        group.hand_back(connection)
    signal.raise_signal(signal.SIGTERM)


def _allow_children() -> None:
    """Allow make() to use multiprocessing in a worker that is a daemon, as Dask's are."""
    process = multiprocessing.current_process()
    if process.daemon:
        process.daemon = False


@contextmanager
def _ending_itself(timeout_seconds: float, *, watched: bool) -> Iterator[None]:
    """End this process where a make() takes too long, even if it lets no other thread run.

    Where a driver watches, that does it first and records why; but it may sit on the very
    Dask worker whose interpreter hangs.
    """
    patience_seconds = timeout_seconds * OVERDUE_FACTOR + OVERDUE_SECONDS if watched else timeout_seconds
    faulthandler.dump_traceback_later(patience_seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _without_context(name: str, jobs: Sequence[Job], error: Exception) -> Report:
    if (jobs and is_infrastructure(error)) or is_full(error):
        return Report(tuple(Outcome(job, Ending.TRANSIENT, portable(failure_of(error))) for job in jobs))
    return Report(setup_error=setup_error(name, error), may_pass=is_unreachable(error))


def _portable(outcome: Outcome) -> Outcome:
    return replace(outcome, failure=portable(outcome.failure)) if outcome.failure else outcome
