"""A lock of the server under a name, for what runs of a table had better not do at the same time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import sqlalchemy as sa

from djdist.database.marks import number_of
from djdist.job_stores.jobs_table.transactions import ending_with

LONGEST_WAIT_SECONDS = 30


def advisory_lock(
    connection: Any, backend: str, name: str, *, waits: bool = True
) -> AbstractContextManager[bool]:
    """Hold the lock of a name until the commit; go on without it where others hold it for too long.

    Parameters
    ----------
    connection : sqlalchemy.Connection
        A connection in a transaction, which is committed at the end.
    backend : {"mysql", "postgresql"}
        Its server.
    name : str
        What is locked.
    waits : bool
        Whether to wait for others.

    Returns
    -------
    context manager
        Of whether it is held.
    """
    lock = _lock_in_postgresql if backend == "postgresql" else _lock_in_mysql
    return lock(connection.exec_driver_sql, number_of(name), LONGEST_WAIT_SECONDS if waits else 0)


@contextmanager
def _lock_in_mysql(execute: Any, number: int, seconds: int) -> Iterator[bool]:
    is_held = execute(f"SELECT GET_LOCK('djdist {number}', {seconds})").scalar() == 1
    with ending_with(execute, f"SELECT RELEASE_LOCK('djdist {number}')"):
        yield is_held
        execute("COMMIT")  # MySQL's lock knows no transactions: the next one must find what was inserted


@contextmanager
def _lock_in_postgresql(execute: Any, number: int, seconds: int) -> Iterator[bool]:
    if not seconds:  # a lock_timeout of 0 would be none
        yield execute(f"SELECT pg_try_advisory_xact_lock({number})").scalar()
        return
    execute("SAVEPOINT advisory_lock")  # or a wait that is over would have spoilt the whole transaction
    is_held = True
    try:
        execute(
            f"SET LOCAL lock_timeout = '{seconds}s'; SELECT pg_advisory_xact_lock({number}); "
            "SET LOCAL lock_timeout TO DEFAULT"
        )
    except sa.exc.DBAPIError as error:
        if error.connection_invalidated:
            raise
        execute("ROLLBACK TO SAVEPOINT advisory_lock")
        is_held = False
    yield is_held
