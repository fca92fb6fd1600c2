"""What travels to a worker: the connection's settings and the table's class."""

import io
import logging
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import cloudpickle
import datajoint as dj

from djdist.bindings import bind, bindings, register, tables
from djdist.dbapi import ConnectionSettings, Login, connect
from djdist.errors import WorkerSetupError

_IMPORTED_IN_PID = os.getpid()

PLACE = ("host", "port", "database_name")


def settings_of(connection: dj.Connection, *, ship_credentials: bool = True) -> ConnectionSettings:
    """Take the settings of a connection, with or without its credentials."""
    config = connection._config.model_dump()
    if not ship_credentials:
        del config["database"], config["stores"]
    login = _login(connection) if ship_credentials else None
    return ConnectionSettings(connection.adapter.backend, login, config)


def apply_settings(settings: ConnectionSettings, config: Any) -> None:
    """Give a process's DataJoint configuration the values that it has at the caller."""
    for name, value in settings.config.items():
        group = getattr(config, name)
        if isinstance(value, dict) and not isinstance(group, dict):
            for key, setting in value.items():
                setattr(group, key, setting)
        else:
            setattr(config, name, value)
    if settings.login is not None:
        _apply_login(settings.login, config)


def open_dbapi_connection(settings: ConnectionSettings) -> Any:
    """Open a new connection of the database's driver, by the same settings as DataJoint's."""
    settings = _or_own(settings)
    return connect(settings.backend, settings.login or _own_login(), settings.charset)


def pack_table(table: type[dj.Table]) -> bytes:
    """Pickle a table's class: by name where a module holds it, else by value."""
    file = io.BytesIO()
    _Pickler(file).dump((table, bindings(), sorted(table.connection.schemas)))
    return file.getvalue()


def unpack_table(packed: bytes, settings: ConnectionSettings, preload: tuple[str, ...] = ()) -> dj.Table:
    """Load a table in a worker, connected as at the caller.

    Raises
    ------
    ImportError, AttributeError
        The module or its class isn't there.
    Exception
        What connecting to the database raises.
    """
    settings = _or_own(settings)
    _own.note(settings.login)
    apply_settings(settings, dj.config)
    with quiet():
        _leave_other_database(settings)
        for module in preload:
            import_module(module)
        table, bound, schemas = _Unpickler(io.BytesIO(packed)).load()
        for module, name, database in bound:
            bind(module, name, database)
        _connect(table.connection, settings)
    register(table, schemas)
    apply_settings(settings, table.connection._config)
    return table()


def is_alive(connection: dj.Connection) -> bool:
    """Tell whether a connection can be used; DataJoint's own answer is a guess on PostgreSQL."""
    try:
        connection.query("SELECT 1", reconnect=False)
    except Exception:
        return False
    return True


@contextmanager
def quiet() -> Iterator[None]:
    """Spare the caller's terminal a message for each worker that connects."""
    level = dj.logger.level
    dj.logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        dj.logger.setLevel(level)


def _login(connection: dj.Connection) -> Login:
    info = connection.conn_info
    return {
        "host": info["host"],
        "port": info["port"],
        "user": info["user"],
        "password": info["passwd"],
        "database_name": info["database_name"],
        "use_tls": info["ssl_input"],
    }


def _apply_login(login: Login, config: Any) -> None:
    database = config.database
    database.host, database.port = login["host"], login["port"]
    database.user, database.password = login["user"], login["password"]
    database.name = login["database_name"]
    if not isinstance(login["use_tls"], dict):
        database.use_tls = login["use_tls"]


@dataclass(repr=False)
class _Own:
    """The login and the settings that a process had before others were sent to it."""

    login: Login | None = None
    config: dict[str, Any] = field(default_factory=dict)
    sent: Login | None = None

    @property
    def replaced(self) -> bool:
        """Whether the process is logged in by what was sent to it."""
        connection = dj.instance._singleton_connection
        return connection is not None and self.sent == _login(connection)

    def note(self, login: Login | None) -> None:
        if login in (None, self.login):
            return
        if self.login is None or not self.replaced:
            self.login = _configured_login(dj.config)
            self.config = dj.config.model_dump(include={"database", "stores"})
        self.sent = login


_own = _Own()


def _or_own(settings: ConnectionSettings) -> ConnectionSettings:
    """Where no login comes along, let none that came along earlier serve."""
    if settings.login is not None or not _own.replaced:
        return settings
    return replace(settings, login=_own.login, config={**settings.config, **_own.config})


def _own_login() -> Login:
    """Give the login of this process, which needs no connection for that."""
    connection = dj.instance._singleton_connection
    login = _login(connection) if connection else _configured_login(dj.config)
    if login["user"] is None:
        raise WorkerSetupError(
            "no login was sent here (djdist.config.ship_credentials is False) and none is configured: set "
            "DJ_USER and DJ_PASS, or write a datajoint.json, on every node."
        )
    return login


def _configured_login(config: Any) -> Login:
    database = config.database
    password = database.password
    return {
        "host": database.host,
        "port": database.port,
        "user": database.user,
        "password": password.get_secret_value() if hasattr(password, "get_secret_value") else password,
        "database_name": database.name,
        "use_tls": database.use_tls,
    }


def _leave_other_database(settings: ConnectionSettings) -> None:
    """Let tables that are imported from now on connect anew; those of another run keep theirs."""
    connection = dj.instance._singleton_connection
    if connection is None:
        return
    if settings.login not in (None, _login(connection)):
        dj.conn(reset=True)
    else:
        _revive(connection)


def _connect(connection: dj.Connection, settings: ConnectionSettings) -> None:
    """Log in as the caller did."""
    login = _login(connection)
    if settings.login and any(login[name] != settings.login[name] for name in PLACE):
        raise WorkerSetupError(
            f"this process already has the pipeline connected to {login['host']}:{login['port']}, "
            f"not to {settings.login['host']}:{settings.login['port']}. Restart the workers, or use others."
        )
    if settings.login and settings.login != login:
        use_tls = settings.login["use_tls"]
        ssl = use_tls if isinstance(use_tls, dict) else use_tls is not False
        user, password = settings.login["user"], settings.login["password"]
        connection.conn_info.update(user=user, passwd=password, ssl_input=use_tls, ssl=ssl)
        connection.connect()
    else:
        _revive(connection)


def _revive(connection: dj.Connection) -> None:
    """Connect anew where the socket is dead or the one of a forked process's parent."""
    if os.getpid() != _IMPORTED_IN_PID or not is_alive(connection):
        connection.connect()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Leaves connections and namespaces behind, which belong to a process."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._contexts = {id(t.__dict__.get("declaration_context")) for t in tables(dj.Table)}

    def persistent_id(self, obj: Any) -> str | None:
        if isinstance(obj, dj.Connection):
            return "connection"
        if isinstance(obj, dict) and ("__builtins__" in obj or id(obj) in self._contexts):
            return "namespace"
        return None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: str) -> Any:
        return dj.conn() if pid == "connection" else {}
