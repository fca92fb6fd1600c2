"""Transactions of a run, with patience for a database that is away, but no more than the run has."""

import logging
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import sqlalchemy as sa

from djdist._backoff import backoff_seconds
from djdist.database import silence
from djdist.database.dbapi import ConnectionSettings, connect, shut
from djdist.database.errors import RIGHTS, is_away, is_denial, is_full, is_infrastructure, limit_of
from djdist.database.marks import number_of
from djdist.database.sessions import prepare
from djdist.database.silence import Line, bear, server_name
from djdist.errors import DatabaseError
from djdist.job_stores.jobs_table.background import BackgroundCall, BackgroundThread

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DRIVERS_RIGHTS = f"A driver needs SELECT, INSERT, UPDATE and DELETE on it. {RIGHTS}"
FIRST_PATIENCE_SECONDS = 2.0
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
LOOK_SECONDS = 0.5
LAST_SECONDS = 3.0
SETTINGS = "settings"
"""The execution option of a statement that holds what is sent before it and holds for its transaction."""
ISOLATION = "isolation"
READ_COMMITTED = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; "
"""A transaction of one statement would have the server's default."""


class Transactions:
    """Does things in transactions, again where the database was away or gave one up for another one.

    All tables of a run share it, and so do their copies that were pickled together.

    Parameters
    ----------
    settings : ConnectionSettings
        The way to the database.
    patience_seconds : float
        How long to wait for a database that goes away after it was there.
    outlasts : bool
        Wait for as long as it takes, if the connection was lost and the run still wants it.
    """

    def __init__(
        self, settings: ConnectionSettings, patience_seconds: float, *, outlasts: bool = False
    ) -> None:
        self._settings = settings
        self._patience_seconds = patience_seconds
        self.outlasts = outlasts
        self._reached = False
        self._goes_on: Callable[[], bool] = lambda: True
        self._engine: sa.Engine | None = None
        self._threads: list[BackgroundThread] = []
        self._slow = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Transactions, outlasts=self.outlasts), (self._settings, self._patience_seconds)

    def assume_reached(self) -> None:
        """Take a database that can't be reached for one that is away for a while."""
        self._reached = True

    def wait_while(self, wanted: Callable[[], bool]) -> None:
        """Wait for a database that is away no longer than this is wanted."""
        self._goes_on = wanted

    def close(self) -> None:
        """Close the connections."""
        while self._threads:
            self._threads.pop().stop()
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    @contextmanager
    def one_slow(self) -> Iterator[None]:
        """Do what reads whole tables, one such thing at a time.

        A refresh and a count would take both connections, and leave none to the loop and the lease.
        """
        while not self._slow.acquire(timeout=LOOK_SECONDS):
            if not self._goes_on():
                raise _no_answer()
        try:
            yield
        finally:
            self._slow.release()

    def run(self, act: Callable[[sa.Connection], Result], trouble: str, *, is_one: bool = False) -> Result:
        """Do something in a transaction; ``trouble`` is what errors say.

        One statement ``is_one`` transaction by itself on PostgreSQL, which spares two trips of three. PyMySQL
        would take a trip to say so, and another one to take it back.

        Raises
        ------
        DatabaseError
            The database can't be reached, refuses it, or the run ends before it answers.
        """
        began_at, tries, told = time.monotonic(), 0, False
        while True:
            try:
                result = self._in_time(act, is_one=is_one and self._settings.backend == "postgresql")
            except sa.exc.DBAPIError as error:
                tries += 1
                pause_seconds = backoff_seconds(tries, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
                waited_seconds = time.monotonic() + pause_seconds - began_at
                if error.orig is None or waited_seconds > self._patience(error.orig) or not self._goes_on():
                    raise _unreachable(error, trouble) from error
                if pause_seconds >= 1 and not told:
                    logger.warning("Waiting for the database: %s", error.orig)
                    told = True
                self.engine().dispose()  # another server may have its address by now
                time.sleep(pause_seconds)
            else:
                if told:
                    logger.info("The database answers after %.0f s", time.monotonic() - began_at)
                self._reached = True
                return result

    def engine(self) -> sa.Engine:
        """Return what opens connections, and keeps two."""
        if self._engine is None:
            drivers = {"mysql": "mysql+pymysql://", "postgresql": "postgresql+psycopg2://"}
            self._engine = sa.create_engine(
                drivers[self._settings.backend],
                creator=lambda: _marked(_connection(self._settings)),
                isolation_level="READ COMMITTED",  # in a stricter one InnoDB locks gaps between jobs, too
                pool_size=2,
                max_overflow=0,
                pool_timeout=None,  # the loop and the lease share one, while something slow has the other
                pool_reset_on_return=None,  # every transaction is ended already
            )
            sa.event.listen(self._engine, "connect", _note_server)
            sa.event.listen(self._engine, "before_cursor_execute", _with_settings, retval=True)
        return self._engine

    def _in_time(self, act: Callable[[sa.Connection], Result], *, is_one: bool) -> Result:
        """Do something in a transaction, and leave it where the run is to end before it is done."""
        engine, lines = self.engine(), list[Line]()

        def transact() -> Result:
            with engine.connect() as connection:
                if is_one:
                    connection.execution_options(isolation_level="AUTOCOMMIT", **{ISOLATION: READ_COMMITTED})
                with connection.begin():
                    lines.append(self._line_of(connection))
                    return act(connection)

        thread = self._threads.pop() if self._threads else BackgroundThread()
        call = thread.begin(transact)
        try:
            self._wait_for(call, lines)
        finally:  # by a signal, too
            self._wait_no_longer(call, thread, lines)
        if not call.is_done:
            raise _no_answer()
        return call.result()

    def _wait_for(self, call: BackgroundCall[Result], lines: Sequence[Line]) -> None:
        began_at, doubted = time.monotonic(), False
        while not call.wait(LOOK_SECONDS) and self._goes_on():
            if lines and not doubted and time.monotonic() - began_at >= silence.DOUBT_SECONDS:
                doubted = True
                lines[0].doubt(lambda: not call.is_done)

    def _wait_no_longer(
        self, call: BackgroundCall[Result], thread: BackgroundThread, lines: Sequence[Line]
    ) -> None:
        """Grant a COMMIT that is on its way a moment, then end its connection."""
        try:
            call.wait(LAST_SECONDS)
        finally:
            if call.is_done:
                self._threads.append(thread)
            else:
                for line in lines:
                    shut(line.connection)
                self.engine().dispose()  # nobody gets what the thread still holds
                thread.stop()

    def _line_of(self, connection: sa.Connection) -> Line:
        raw = connection.connection.dbapi_connection
        return Line(raw, lambda: _connection(self._settings), connection.info["server"])

    def _patience(self, error: BaseException) -> float:
        if limit_of(error) or is_full(error):
            return self._patience_seconds
        if not is_infrastructure(error):
            return 0
        if not self._reached:
            return FIRST_PATIENCE_SECONDS
        return float("inf") if self.outlasts and is_away(error) else self._patience_seconds


@dataclass(frozen=True)
class TransactionsOn:
    """Transactions on one place, of which errors say what can't be done there."""

    transactions: Transactions
    trouble: str

    def run(self, act: Callable[[sa.Connection], Result]) -> Result:
        """Do something in a transaction, as :meth:`Transactions.run` does it."""
        return self.transactions.run(act, self.trouble)

    def run_one(self, act: Callable[[sa.Connection], Result]) -> Result:
        """Do what is one statement."""
        return self.transactions.run(act, self.trouble, is_one=True)

    def execute(self, statement: sa.Executable) -> int:
        """Execute a statement in a transaction of its own; return how many rows it hit."""
        return self.run_one(lambda connection: int(connection.execute(statement).rowcount))

    def number(self, query: sa.Executable) -> int:
        """Return the one number that a query gives."""
        return self.run_one(lambda connection: int(connection.execute(query).scalar_one()))


@contextmanager
def ending_with(execute: Callable[[str], object], statement: str) -> Iterator[None]:
    """Execute a statement at the end, also after an error, which then is the one that is raised.

    Where the connection is lost only here, that is an error, too: it has undone what was done before.
    """
    try:
        yield
    except BaseException:
        with suppress(Exception):
            execute(statement)
        raise
    execute(statement)


def _with_settings(
    connection: sa.Connection, cursor: Any, sql: str, parameters: Any, context: Any, many: bool
) -> tuple[str, Any]:
    """Send settings in the same trip, which makes all of it one transaction."""
    options = context.execution_options
    return options.get(ISOLATION, "") + options.get(SETTINGS, "") + sql, parameters


def _no_answer() -> DatabaseError:
    return DatabaseError(f"The database gives no answer to {platform.node()}, which is waited for no longer.")


def _unreachable(error: sa.exc.DBAPIError, trouble: str) -> DatabaseError:
    message = f"{trouble} from {platform.node()}: {str(error.orig).strip()}"
    denied = error.orig is not None and is_denial(error.orig)
    return DatabaseError(f"{message}\n{DRIVERS_RIGHTS}" if denied else message)


def _note_server(connection: Any, record: sa.pool.ConnectionPoolEntry) -> None:
    record.info["server"] = server_name(connection)


def _marked(connection: Any) -> Any:
    """Mark a connection's session, so that what is left of it can be found and ended if it falls silent."""
    bear(connection, number_of(uuid4().hex))
    return connection


def _connection(settings: ConnectionSettings) -> Any:
    connection = _opened(settings)
    prepare(connection, settings.backend)
    return connection


def _opened(settings: ConnectionSettings) -> Any:
    if settings.login is not None:
        return connect(settings.backend, settings.login, settings.charset)
    from djdist.shipping.packing import (
        open_dbapi_connection,  # it imports DataJoint, which takes half a second
    )

    return open_dbapi_connection(settings)
