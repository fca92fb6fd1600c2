"""One's turn at what runs of a table had better not do at the same time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from djdist.database.marks import number_of

LONGEST_WAIT_SECONDS = 30


def turn(connection: Any, backend: str, name: str) -> AbstractContextManager[None]:
    """Wait until nobody else has the turn of this name, but not for ever, and keep it until a commit.

    Parameters
    ----------
    connection : sqlalchemy.Connection
        A connection in a transaction, which is committed at the end.
    backend : {"mysql", "postgresql"}
        Its server.
    name : str
        What the turn is for.
    """
    take = _turn_in_postgresql if backend == "postgresql" else _turn_in_mysql
    return take(connection.exec_driver_sql, number_of(name))


@contextmanager
def _turn_in_mysql(execute: Any, number: int) -> Iterator[None]:
    execute(f"SELECT GET_LOCK('djdist {number}', {LONGEST_WAIT_SECONDS})")
    try:
        yield
        execute("COMMIT")
    finally:
        with suppress(Exception):  # a broken connection has let go of it
            execute(f"SELECT RELEASE_LOCK('djdist {number}')")


@contextmanager
def _turn_in_postgresql(execute: Any, number: int) -> Iterator[None]:
    execute("SAVEPOINT turn")
    try:
        execute(
            f"SET LOCAL lock_timeout = '{LONGEST_WAIT_SECONDS}s'; SELECT pg_advisory_xact_lock({number}); "
            "SET LOCAL lock_timeout TO DEFAULT"
        )
    except Exception:
        execute("ROLLBACK TO SAVEPOINT turn")
    yield
