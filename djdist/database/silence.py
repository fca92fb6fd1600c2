"""Tells a database that has fallen silent from one that is slow, by asking it on a second connection.

A machine that is gone acknowledges nothing, which the kernel notices. A relay or a load balancer
that has forgotten a connection acknowledges all, and its client waits forever.
"""

import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from djdist.database.dbapi import shut, socket_of
from djdist.database.errors import is_full, is_infrastructure
from djdist.database.marks import BEARERS, END, MARK, UNMARK

logger = logging.getLogger(__name__)

DOUBT_SECONDS = 20.0
"""After this time without an answer the server is asked what became of it."""
CERTAIN_SECONDS = 25.0
"""During this time nothing that it says may change, and no byte may come or go."""
ASK_SECONDS = 5.0

BYTES_ACKED_AND_RECEIVED = slice(120, 136)
"""Where Linux's tcp_info has them."""

DOING = {
    "mysql": "SELECT CONNECTION_ID(), @@hostname, "
    "(SELECT IF(command = 'Sleep', 'idle', 'busy') FROM information_schema.processlist WHERE id = %s)",
    "postgresql": "SELECT pg_backend_pid(), '', "
    "(SELECT state || state_change::text FROM pg_stat_activity WHERE pid = %s)",
}
BLOCKERS = {
    "mariadb": "SELECT DISTINCT it.trx_mysql_thread_id, p.user, p.host, p.time "
    "FROM information_schema.innodb_lock_waits AS w "
    "JOIN information_schema.innodb_trx AS me ON me.trx_id = w.requesting_trx_id "
    "JOIN information_schema.innodb_trx AS it ON it.trx_id = w.blocking_trx_id "
    "JOIN information_schema.processlist AS p ON p.id = it.trx_mysql_thread_id "
    "WHERE me.trx_mysql_thread_id = %s",
    "mysql": "SELECT DISTINCT it.processlist_id, it.processlist_user, it.processlist_host, "
    "it.processlist_time FROM performance_schema.data_lock_waits AS w "
    "JOIN performance_schema.threads AS me ON me.thread_id = w.requesting_thread_id "
    "JOIN performance_schema.threads AS it ON it.thread_id = w.blocking_thread_id "
    "WHERE me.processlist_id = %s",
    "postgresql": "SELECT pid, usename, client_addr::text, "
    "extract(epoch FROM clock_timestamp() - state_change) FROM pg_stat_activity "
    "WHERE pid = ANY(pg_blocking_pids(%s))",
}
"""Who holds the locks that a session waits for; MySQL and MariaDB tell only privileged accounts."""
CANCEL = "SELECT pg_cancel_backend(%s) WHERE pg_backend_pid() = %s"
"""Not through a pooler, whose sessions have numbers of its own."""
GONE = "gone"
AWAY = "away"


_marks: "WeakKeyDictionary[Any, int]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Line:
    """A connection, and how to reach its server by another one.

    Parameters
    ----------
    connection : pymysql.Connection or psycopg2.extensions.connection
        The connection of the database's driver.
    reopen : callable
        Opens another one.
    server : str
        The name of the MySQL server, of which a cluster has several.
    """

    connection: Any
    reopen: Callable[[], Any]
    server: str = ""

    def doubt(self, waits: Callable[[], bool], told: Callable[[str], None] = logger.warning) -> None:
        """End the connection, in a thread of its own, if the answer that it waits for will never come.

        Where that is held up by another session's lock, ``told`` is told by whose.
        """
        doubt = threading.Thread(target=self._doubt, args=(waits, told), name="djdist-doubt", daemon=True)
        doubt.start()

    def cancel(self, waits: Callable[[], bool]) -> None:
        """Ask PostgreSQL, in a thread of its own, to give up the statement that the connection waits for.

        psycopg2's own way holds up all threads until a server has answered that may be silent.
        """
        if not _is_mysql(self.connection):  # whose driver heeds signals itself
            threading.Thread(target=self._cancel, args=[waits], name="djdist-cancel", daemon=True).start()

    def _cancel(self, waits: Callable[[], bool]) -> None:
        with suppress(Exception), closing(self.reopen()) as other:
            if waits():  # connecting took a while, and the next statement is none that is to be given up
                other.cursor().execute(CANCEL, [session_id(self.connection), session_id(other)])

    def _doubt(self, waits: Callable[[], bool], told: Callable[[str], None]) -> None:
        with suppress(Exception), closing(self.reopen()) as other:
            for blocker in self._blockers(other):
                told(blocker)
        self._end_if_silent(waits)

    def _end_if_silent(self, waits: Callable[[], bool]) -> None:
        evidence: tuple[str, bytes] | None = None
        since = time.monotonic()
        while waits():
            last, evidence = evidence, self._evidence()
            if evidence is None or evidence != last:
                since = time.monotonic()
            elif time.monotonic() - since >= CERTAIN_SECONDS and waits():
                logger.warning("The database fell silent: its server is %s, so this reconnects", evidence[0])
                session = session_id(self.connection)
                shut(self.connection)
                self._end_session(session)
                return
            time.sleep(ASK_SECONDS)

    def _end_session(self, session: int) -> None:
        """End what the server still has of this connection: with its locks it would hold up the next one."""
        mark = _marks.get(self.connection)
        if mark is None:
            return
        with suppress(Exception), closing(self.reopen()) as other:
            backend, cursor = _backend(other), other.cursor()
            cursor.execute(BEARERS[backend].format(mark))
            if (session,) in cursor.fetchall():
                cursor.execute(END[backend].format(session))

    def _blockers(self, other: Any) -> list[str]:
        """Return whose lock this connection waits for, if it does and the account may see that."""
        cursor = other.cursor()
        cursor.execute(BLOCKERS[_flavor(other)], [session_id(self.connection)])
        end = END[_backend(other)]
        return [
            f"Waiting for a lock that session {session} ({user} on {host or 'the same host'}) holds, which "
            f"has not begun anything for {seconds:.0f} s. `{end.format(session)}` would free it."
            for session, user, host, seconds in cursor.fetchall()
        ]

    def _evidence(self) -> tuple[str, bytes] | None:
        """Return what tells that the server does nothing for this connection, if all tells that."""
        traffic = _traffic(self.connection)
        doing = self._doing() if traffic else None
        return (doing, traffic) if doing and traffic else None

    def _doing(self) -> str | None:
        try:
            other = self.reopen()
        except Exception as error:
            return AWAY if is_infrastructure(error) and not is_full(error) else None
        with suppress(Exception), closing(other):
            return self._told_by(other)
        return None

    def _told_by(self, other: Any) -> str | None:
        """Ask what the session does; what a proxy or another server tells is nothing."""
        cursor = other.cursor()
        cursor.execute(DOING[_backend(other)], [session_id(self.connection)])
        me, server, doing = cursor.fetchone()
        if me != session_id(other) or server != self.server:
            return None
        if doing is None:
            return GONE
        return str(doing) if doing.startswith("idle") else None


def session_id(connection: Any) -> int:
    """Return the number by which the server knows a connection, as its driver was told it at the start."""
    return int(connection.thread_id() if _is_mysql(connection) else connection.info.backend_pid)


def server_name(connection: Any) -> str:
    """Return the name of a MySQL server."""
    if not _is_mysql(connection):
        return ""
    cursor = connection.cursor()
    cursor.execute("SELECT @@hostname")
    return str(cursor.fetchone()[0])


def bear(connection: Any, mark: int) -> None:
    """Mark a session, in place of an earlier mark, unless the server refuses."""
    earlier = _marks.get(connection)
    if earlier == mark:
        return
    _marks[connection] = mark
    with suppress(Exception):
        backend, cursor = _backend(connection), connection.cursor()
        if earlier is not None:
            cursor.execute(UNMARK[backend].format(earlier))
        cursor.execute(MARK[backend].format(mark), [session_id(connection)])


def _backend(connection: Any) -> str:
    return "mysql" if _is_mysql(connection) else "postgresql"


def _flavor(connection: Any) -> str:
    is_mariadb = _is_mysql(connection) and "MariaDB" in connection.get_server_info()
    return "mariadb" if is_mariadb else _backend(connection)


def _is_mysql(connection: Any) -> bool:
    return hasattr(connection, "thread_id")


def _traffic(connection: Any) -> bytes:
    """Return what has come and gone so far; nothing where an answer waits to be read, or nobody knows."""
    try:
        with socket_of(connection) as line:
            poll = select.poll()
            poll.register(line, select.POLLIN)
            info = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED_AND_RECEIVED.stop)
            return b"" if poll.poll(0) else info[BYTES_ACKED_AND_RECEIVED]
    except (OSError, AttributeError):
        return b""
