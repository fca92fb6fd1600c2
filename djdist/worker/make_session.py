"""Makes keys in DataJoint's own way, one after the other, with a say in how each transaction ends."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib import import_module
from threading import local
from types import FrameType, TracebackType
from typing import Any

import datajoint as dj
from typing_extensions import Self

from djdist._job import Key
from djdist.database.job_statements import Connection
from djdist.database.sessions import READ_COMMITTED
from djdist.errors import IncompatibleDataJointError, MakeError
from djdist.pipeline.checks import makes_in_parts
from djdist.shipping.packing import quiet
from djdist.worker.session import (
    COMMIT_AND_CHAIN,
    LastStatement,
    MariaDBSession,
    PlannedSession,
    PostgreSQLSession,
    Session,
    is_mariadb,
)
from djdist.worker.shared_transaction import SharedTransaction

logger = logging.getLogger(__name__)

_here = local()

WORTH_PREPARING = 10
"""From this many keys on, the server parses and plans the statement that ends a job only once."""


def load_early() -> None:
    """Import what DataJoint imports in its first ``make()``, which should not seem to take that long."""
    import_module("deepdiff")


def is_making() -> bool:
    """Return whether this thread is inside a ``make()``, which may populate what it needs itself."""
    return getattr(_here, "depth", 0) > 0


class MakeSession:
    """Makes keys of one table, for the time of a ``with``.

    A ``make()`` may populate other tables where it has no transaction open: those keys are made
    at once, on its own connection, and their commits are none of its own.

    Parameters
    ----------
    table : datajoint.Computed or datajoint.Imported
        The table.
    make_kwargs : dict
        Keyword arguments of each ``make()``.
    version : str
        The code's version, which DataJoint else looks up for every key, with git.
    count : int
        How many keys will be made. Each has a transaction of its own; where nothing comes
        between two, the commit of one begins the next, which saves a statement.
    fenced : bool
        Each transaction ends with a job, which its run changes at the same time.

    Attributes
    ----------
    committing : bool
        The latest ``make()`` had ended, and its commit may have reached the server.
    has_populated : bool
        Some ``make()`` has populated a table itself, be it this one.
    is_nested : bool
        It makes what another ``make()`` of this thread populates.
    """

    def __init__(
        self,
        table: Any,
        make_kwargs: dict[str, Any],
        version: str = "",
        *,
        count: int = 1,
        fenced: bool = True,
    ) -> None:
        self._table = table
        self._make_kwargs = make_kwargs
        self._version = version
        self._chains = count > 1 and not _does_more_than_its_transaction(table)
        self._chained = False
        self._count = count
        self._fenced = fenced
        self._session: Session | None = None
        self._missing: Key | None = None
        self._caller: FrameType | None = None
        self._shared: SharedTransaction | None = None
        self.committing = self.has_populated = False
        self.is_nested = is_making()
        self._patches = ExitStack()

    @property
    def session(self) -> Session:
        """The session of the transaction in which the table makes its keys."""
        connection = self._table.connection
        if self._session is None or self._session.connection is not connection._conn:
            kind = _session_kind(connection, self._count) if self._chains else Session
            self._session = kind(connection._conn, connection.adapter.translate_error)
        return self._session

    def __enter__(self) -> Self:
        connection, kind = self._table.connection, type(self._table)
        self._start, self._commit, self._cancel, self._close = (
            connection.start_transaction,
            connection.commit_transaction,
            connection.cancel_transaction,
            connection.close,
        )
        contains = kind.__contains__
        for owner, name, value in (
            (dj.jobs, "_get_job_version", lambda config=None: self._version),
            (dj.Table, "full_table_name", _name_known(self._table)),
            (kind, "__contains__", lambda table, key: key is not self._missing and contains(table, key)),
            (dj.user_tables, "from_camel_case", _from_camel_case),
            (connection, "start_transaction", self._start_transaction),
            (connection, "commit_transaction", self._commit_transaction),
            (connection, "cancel_transaction", self._cancel_transaction),
            (connection, "close", self._note_and_close),
            (dj.AutoPopulate, "populate", lambda *tables, **options: self._populate(*tables, **options)),
            *(_isolation(connection.adapter) if self._fenced else ()),
        ):
            self._patches.enter_context(_replaced(owner, name, value))
        _here.depth = getattr(_here, "depth", 0) + 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _here.depth -= 1
        self._patches.close()
        if self._chained:
            with suppress(Exception):  # a connection that is gone took it along
                self._table.connection.cancel_transaction()
        if self._session:
            self._session.close()

    def __call__(self, key: Key, finish: Callable[[Connection], None], *, is_missing: bool = False) -> bool:
        """Make one key, with ``finish`` called just before COMMIT, and given what takes its one query.

        Whatever ``finish`` raises undoes the whole transaction. Where the key is known to be missing,
        DataJoint is spared its look for it; ``make()`` gets a copy of it.

        Returns
        -------
        bool
            False if the key was in the table already; ``finish`` was not called then.

        Raises
        ------
        IncompatibleDataJointError
            DataJoint has committed the key otherwise than by the commit that djdist knows.
        """
        self._finish, self._missing = finish, key if is_missing else None
        self._committed = self._closed = self.committing = False
        self._caller = sys._getframe()  # by which the commit of this key is told from all others
        try:
            made = bool(self._table._populate1(key, None, False, False, make_kwargs=self._make_kwargs))
        except Exception as error:
            if self._closed:
                raise MakeError(
                    "make() closed the connection to the database, which it has to leave open"
                ) from error
            if self._shared or not self._committed:
                raise
            logger.warning(
                "%s(%s) is made, but its metadata could not be written: %s",
                type(self._table).__name__,
                key,
                error,
            )
            return True
        finally:
            self._missing = self._caller = None
            if not self._shared:
                _leave_transaction(self._table.connection)
        if made and not self._committed:
            raise IncompatibleDataJointError(
                f"DataJoint {dj.__version__} has made the key, but not by the commit with which djdist ends "
                "its job: install a version of DataJoint that djdist's requirements admit."
            )
        return made

    @contextmanager
    def sharing(self) -> Iterator[SharedTransaction]:
        """Make the keys of a ``with`` in one transaction, which is undone unless it is committed there.

        What is to finish a key alone is not called.
        """
        self.committing, connection = False, self._table.connection
        try:
            self._start()
            session = _session_kind(connection, 1)(connection._conn, connection.adapter.translate_error)
            self._shared = SharedTransaction(connection, session)
            yield self._shared
        finally:
            self._shared = None
            _leave_transaction(connection)

    def commit_shared(self) -> None:
        """Commit what was made in a shared transaction."""
        self.committing = True
        self._shared = None  # where its answer is lost, DataJoint reconnects and cancels another one
        self._commit()

    def _populate(self, *arguments: Any, **options: Any) -> Any:
        """Populate a table from within ``make()`` as djdist does: native's handles signals, as only a main
        thread may.
        """
        self.has_populated = True
        return import_module("djdist._populate").populate(*arguments, **options)

    def _start_transaction(self) -> None:
        if self._shared and self._is_of_key(sys._getframe(1)):
            return
        is_begun = self._chained and self._session is self.session  # unless it was reconnected since
        self._chained = False
        if is_begun:
            self._table.connection._in_transaction = True
        else:
            self._start()

    def _commit_transaction(self) -> None:
        """Finish the job before the commit that ends its own ``make()``, not before those inside it.

        Any other commit is of the code of ``make()``, or ends a key that it populates itself.
        """
        if not self._is_of_key(sys._getframe(1)):
            self._commit()
            return
        if self._shared:  # which is committed later
            self._committed = True
            return
        self.committing = True
        if self._chains and self.session.in_transaction:  # make() may have ended it
            self._commit_and_chain()
        else:
            self._finish(self.session)
            self._commit()
        self._committed = True

    def _is_of_key(self, frame: FrameType) -> bool:
        """Return whether DataJoint calls from this frame to begin or to commit this very key.

        What is replaced are the connection's methods, which also code of ``make()`` and DataJoint's nested
        ``populate()`` call: only the frames tell.
        """
        is_populate1 = frame.f_code is dj.AutoPopulate._populate1.__code__
        return is_populate1 and frame.f_back is self._caller

    def _cancel_transaction(self) -> None:
        if self._shared:
            self._shared.look()
        self._cancel()

    def _commit_and_chain(self) -> None:
        last = LastStatement(self.session)
        self._finish(last)
        if not last.executed:
            self.session.execute(COMMIT_AND_CHAIN)
        self._chained, self._table.connection._in_transaction = True, False

    def _note_and_close(self) -> None:
        """Note that the connection is closed, which else would look like a lost one."""
        self._closed = True
        self._close()


_from_camel_case = cache(dj.user_tables.from_camel_case)
"""DataJoint works a table's name out whenever it needs it, ten times for a short ``make()``."""


def _name_known(table: Any) -> property:
    """Return DataJoint's property with the answer known for one table."""
    work_out, kind, name = dj.Table.full_table_name.fget, type(table), table.full_table_name
    return property(lambda other: name if type(other) is kind else work_out(other))


def _isolation(adapter: Any) -> Iterator[tuple[Any, str, Any]]:
    """Set the isolation that a fenced finish needs of PostgreSQL, whatever the account's default."""
    if adapter.backend == "postgresql":
        begin = adapter.start_transaction_sql
        yield adapter, "start_transaction_sql", lambda level=None: begin(level or READ_COMMITTED)


def _session_kind(connection: dj.Connection, count: int) -> type[Session]:
    is_worth_preparing = count >= WORTH_PREPARING
    if connection.adapter.backend == "postgresql":
        return PlannedSession if is_worth_preparing else PostgreSQLSession
    return MariaDBSession if is_worth_preparing and is_mariadb(connection._conn) else Session


def _does_more_than_its_transaction(table: Any) -> bool:
    """Return whether DataJoint works between two transactions: for a make() in three parts, or metadata."""
    return makes_in_parts(table) or table._has_job_metadata_attrs()


def _leave_transaction(connection: dj.Connection) -> None:
    try:
        if connection.in_transaction:
            connection.cancel_transaction()
    except dj.errors.LostConnectionError:
        with suppress(Exception), quiet():  # it must not hide what ended the transaction
            connection.connect()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        is_ours = vars(owner).get(name) is value  # unless make() has imported what calls enable()
        if is_ours and own is None:
            delattr(owner, name)
        elif is_ours:
            setattr(owner, name, own)
