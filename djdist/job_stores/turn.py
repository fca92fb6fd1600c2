"""One's turn at what runs of a table had better not do at the same time."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256

from djdist.shipping import ConnectionSettings, open_dbapi_connection

logger = logging.getLogger(__name__)

TAKE = {
    "mysql": "SELECT GET_LOCK('djdist {0:x}', 60)",
    "postgresql": "BEGIN; SET LOCAL lock_timeout = '60s'; SELECT pg_advisory_xact_lock({0})",
}
"""Waits for a minute at most; the server lets go of the lock when the connection is closed."""


@contextmanager
def turn(settings: ConnectionSettings, name: str) -> Iterator[None]:
    """Wait until nobody else has the turn of this name; go on without it where it can't be had."""
    number = int.from_bytes(sha256(name.encode()).digest()[:7], "big")
    with ExitStack() as stack:
        try:
            connection = open_dbapi_connection(settings)
            stack.callback(connection.close)
            connection.cursor().execute(TAKE[settings.backend].format(number))
        except Exception as error:
            logger.debug("No turn for %s: %s", name, error)
        yield
