"""The connection of a pipeline's tables."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import datajoint as dj

from djdist.database.errors import is_being_declared, is_infrastructure
from djdist.database.watchdog import watched
from djdist.errors import DatabaseError
from djdist.shipping.packing import open_dbapi_connection, quiet, settings_of

_in_use = threading.RLock()


def close(connection: dj.Connection) -> None:
    """Release what a session holds: a transaction, locks, or a socket that is dead."""
    with suppress(Exception):
        connection.close()


def reconnect(connection: dj.Connection) -> None:
    """Begin a session that holds nothing."""
    close(connection)
    with quiet():
        connection.connect()
    connection._in_transaction = False


@contextmanager
def reachable(connection: dj.Connection) -> Iterator[None]:
    """Use the caller's own connection, one thread at a time, and say it clearly when it is gone.

    None of the user's code that may wait for other threads is called while it is used.

    Raises
    ------
    DatabaseError
        The database can't be reached by this connection.
    """
    try:
        reopen = partial(open_dbapi_connection, settings_of(connection))
        with _in_use, watched(connection, reopen):
            yield
    except Exception as error:
        if not is_infrastructure(error) or is_being_declared(error):
            raise
        place = f"{connection.conn_info['host']}:{connection.conn_info['port']}"
        raise DatabaseError(
            f"Lost connection to the database at {place}: {error}. "
            "See that it runs and that dj.config.database names it, then call table.connection.connect()."
        ) from error
