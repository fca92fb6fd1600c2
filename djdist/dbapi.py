"""Connections as DataJoint opens them, without DataJoint, which takes half a second to import."""

from dataclasses import dataclass, field
from typing import Any

SQL_MODE = (
    "NO_ZERO_DATE,NO_ZERO_IN_DATE,ERROR_FOR_DIVISION_BY_ZERO,"
    "STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,ONLY_FULL_GROUP_BY"
)
TIMEOUT_SECONDS = 10

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


def connect(backend: str, login: Login, charset: str) -> Any:
    """Open a connection of the database's driver; where nothing is said of TLS, with it if that works."""
    open_connection = _connect_mysql if backend == "mysql" else _connect_postgresql
    if login["use_tls"] is not None:
        return open_connection(login, charset, login["use_tls"])
    try:
        return open_connection(login, charset, True)
    except Exception:
        return open_connection(login, charset, False)


def _connect_mysql(login: Login, charset: str, tls: Tls) -> Any:
    import pymysql

    encrypted = {"ssl_disabled": False, "ssl": {} if tls is True else tls}
    return pymysql.connect(
        host=login["host"],
        port=login["port"],
        user=login["user"],
        password=login["password"],
        sql_mode=SQL_MODE,
        charset=charset,
        autocommit=True,
        **({"ssl_disabled": True} if tls is False else encrypted),
    )


def _connect_postgresql(login: Login, charset: str, tls: Tls) -> Any:
    import psycopg2

    connection = psycopg2.connect(
        host=login["host"],
        port=login["port"],
        user=login["user"],
        password=login["password"],
        dbname=login["database_name"] or "postgres",
        sslmode="disable" if tls is False else "require",
        connect_timeout=TIMEOUT_SECONDS,
    )
    connection.autocommit = True
    return connection
