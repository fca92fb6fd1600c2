"""Connections as DataJoint opens them, without DataJoint, which takes half a second to import."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

SQL_MODE = (
    "NO_ZERO_DATE,NO_ZERO_IN_DATE,ERROR_FOR_DIVISION_BY_ZERO,"
    "STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,ONLY_FULL_GROUP_BY"
)
TIMEOUT_SECONDS = 10
"""So long it may take to connect, from the first packet to the last question of the server."""

KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
"""A peer is gone whose machine acknowledges nothing for a minute: no probe (which costs the server
nothing, however long it works on an answer), and nothing that was sent. A system that lacks one of
them, as macOS does, has the others."""
KEEPALIVE_OF_SERVER = (
    "SELECT set_config(name, CASE name WHEN 'tcp_user_timeout' THEN '60000' WHEN 'tcp_keepalives_count' "
    "THEN '3' ELSE '15' END, false) FROM pg_catalog.pg_settings WHERE name IN ('tcp_keepalives_idle', "
    "'tcp_keepalives_interval', 'tcp_keepalives_count', 'tcp_user_timeout')"
)
"""Lets PostgreSQL end a session, and release its locks, as soon after the client's machine is gone."""

Login = dict[str, Any]
Tls = bool | dict[str, Any]


@dataclass(frozen=True)
class ConnectionSettings:
    """A connection's login and DataJoint's settings at the caller.

    ``login`` is None where the workers use their own. Neither shows when printed.
    """

    backend: str
    login: Login | None = field(repr=False)
    config: dict[str, Any] = field(repr=False)

    @property
    def charset(self) -> str:
        """The character set of the connection."""
        return str(self.config["connection"]["charset"])


def connect(backend: str, login: Login, charset: str, timeout_seconds: int | None = None) -> Any:
    """Open a connection of the database's driver; where nothing is said of TLS, with it if that works."""
    seconds = timeout_seconds or TIMEOUT_SECONDS
    open_connection = _connect_mysql if backend == "mysql" else _connect_postgresql
    if login["use_tls"] is not None:
        return open_connection(login, charset, login["use_tls"], seconds)
    try:
        return open_connection(login, charset, True, seconds)
    except Exception as error:
        if _is_timeout(error):  # a server that does not answer would only be waited for twice
            raise
        return open_connection(login, charset, False, seconds)


def keep_alive(connection: Any) -> None:
    """Notice a peer that is gone, also while it owes an answer, but wait for one that is slow."""
    with socket_of(connection) as line, suppress(OSError):  # a Unix socket has none of it
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def shut(connection: Any) -> None:
    """End a connection that another thread waits for, which gets an error."""
    with suppress(OSError, AttributeError), socket_of(connection) as line:
        line.shutdown(socket.SHUT_RDWR)


def socket_of(connection: Any) -> socket.socket:
    """Return a connection's socket a second time, to be closed without ending the connection."""
    number = getattr(connection, "_sock", connection).fileno()
    return socket.socket(fileno=os.dup(number))


def _is_timeout(error: Exception) -> bool:
    return any(phrase in str(error) for phrase in ("timed out", "timeout expired"))


def _connect_mysql(login: Login, charset: str, tls: Tls, timeout_seconds: int) -> Any:
    import pymysql

    encrypted = {"ssl_disabled": False, "ssl": {} if tls is True else tls}
    connection: Any = pymysql.connect(
        host=login["host"],
        port=login["port"],
        user=login["user"],
        password=login["password"],
        sql_mode=SQL_MODE,
        charset=charset,
        autocommit=True,
        connect_timeout=timeout_seconds,
        read_timeout=timeout_seconds,  # the connection's own timeout ends before the server's greeting
        **({"ssl_disabled": True} if tls is False else encrypted),
    )
    connection._read_timeout = None
    keep_alive(connection)
    return connection


def _connect_postgresql(login: Login, charset: str, tls: Tls, timeout_seconds: int) -> Any:
    import psycopg2

    connection = psycopg2.connect(
        host=login["host"],
        port=login["port"],
        user=login["user"],
        password=login["password"],
        dbname=login["database_name"] or "postgres",
        sslmode="disable" if tls is False else "require",
        connect_timeout=timeout_seconds,
    )
    connection.autocommit = True
    keep_alive(connection)
    connection.cursor().execute(KEEPALIVE_OF_SERVER)
    return connection
