"""What travels to a worker: the connection's settings and the table's class."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any

import datajoint as dj

from djdist.database.dbapi import ConnectionSettings, Login, connect
from djdist.errors import OptionError, WorkerSetupError
from djdist.shipping.assignments import Assignment, of_classes, of_instance
from djdist.shipping.bindings import bindings, bound_tables, register
from djdist.shipping.codecs import codecs_beside_datajoints, codecs_used, register_codec
from djdist.shipping.pickling import SHARED, Pickler, Unpickler, login_of, open_connection

_process = os.getpid()

PLACE = ("host", "port", "database_name")


def settings_of(connection: dj.Connection, *, ship_credentials: bool = True) -> ConnectionSettings:
    """Take the settings of a connection, with or without its credentials."""
    login = login_of(connection) if ship_credentials else None
    return _settings(connection.adapter.backend, login, connection._config)


def shared_settings(connection: dj.Connection, *, ship_credentials: bool = True) -> ConnectionSettings | None:
    """Take the settings of ``dj.config`` and ``dj.conn()``, where a table's connection is another one."""
    shared, config = dj.instance._singleton_connection, dj.instance._global_config
    if shared is connection:
        return None
    if shared is not None:
        return settings_of(shared, ship_credentials=ship_credentials)
    login = _configured_login(config)
    is_sent = ship_credentials and login["user"] is not None
    return _settings(config.database.backend, login if is_sent else None, config)


def apply_settings(settings: ConnectionSettings, config: Any) -> None:
    """Set a process's DataJoint configuration to the caller's values."""
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


def pack(table: dj.Table, make_kwargs: dict[str, Any], *, ship_credentials: bool = True) -> bytes:
    """Pickle a table and the arguments of its ``make()``: by name what modules hold, else by value.

    Raises
    ------
    OptionError
        Something can't be pickled, or needs credentials that may not travel.
    """
    kind = type(table)
    pickler = Pickler(table.connection, ship_credentials=ship_credentials)
    pickler.dump_own_connection()
    pickler.dump(_codecs(pickler, table))
    schemas = sorted(table.connection.schemas)
    _dump(pickler, (kind, bindings(kind, pickler.tried), schemas), f"the class {kind.__name__}", kind)
    pickler.dump(of_classes(kind, pickler.tried, bound_tables(table.connection)))
    _dump_each(pickler, of_instance(table, pickler.tried), "{}, an attribute of the instance,", kind)
    _dump_each(pickler, make_kwargs, "make_kwargs[{!r}]", kind)
    return pickler.pickled


def unpack(
    packed: bytes,
    settings: ConnectionSettings,
    shared: ConnectionSettings | None = None,
    preload: tuple[str, ...] = (),
) -> tuple[dj.Table, dict[str, Any], list[Assignment]]:
    """Load a table in a worker, connected as at the caller.

    Returns
    -------
    datajoint.Table
        The table, with the attributes of the caller's.
    dict
        The arguments of its ``make()``.
    list
        What classes and modules are :func:`~djdist.shipping.assignments.assigned` while it is populated.

    Raises
    ------
    ImportError, AttributeError
        The module or its class isn't there.
    Exception
        What connecting to the database raises.
    """
    settings, shared = _or_own(settings), _or_own(shared or settings)
    _own.note(shared.login)
    apply_settings(shared, dj.instance._global_config)
    with quiet():
        _leave_other_database(shared)
        for module in preload:
            import_module(module)
        unpickler = Unpickler(packed, partial(_shared_connection, shared))
        unpickler.load_own_connection()
        for codec, pickled, is_needed in unpickler.load():
            register_codec(codec, partial(unpickler.loads, pickled), is_needed=is_needed)
        table, bound, schemas = unpickler.load()
        links = bound.apply(unpickler.loads)
        unpickler.own = table.connection
        _connect(table.connection, settings)
        assignments = unpickler.load()
        attributes = {name: unpickler.load() for name in unpickler.load()}
        make_kwargs = {name: unpickler.load() for name in unpickler.load()}
    if table.database not in table.connection.schemas:  # it came by value
        register(table.connection, schemas)
    if table.connection._config is not dj.instance._global_config:
        apply_settings(settings, table.connection._config)
    instance = table()
    vars(instance).update(attributes)
    return instance, make_kwargs, assignments + links


def begin_process() -> None:
    """Note that this process is a fork of one without connections, so that its own will be no parent's."""
    global _process
    _process = os.getpid()


def is_alive(connection: dj.Connection) -> bool:
    """Return whether a connection can be used; DataJoint's own answer is a guess on PostgreSQL."""
    try:
        connection.query("SELECT 1", reconnect=False)
    except Exception:
        return False
    return True


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the messages of each worker that connects, and those on TLS after each error."""
    level = dj.logger.level
    dj.logger.setLevel(logging.WARNING)
    dj.logger.addFilter(_says_more_than_that_there_is_no_tls)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        dj.logger.removeFilter(_says_more_than_that_there_is_no_tls)
        dj.logger.setLevel(level)


def _says_more_than_that_there_is_no_tls(record: logging.LogRecord) -> bool:
    """The caller has been told so already, by its own connection."""
    return not str(record.msg).startswith("SSL connection failed")


def _settings(backend: str, login: Login | None, config: Any) -> ConnectionSettings:
    left_out = {"database", "stores"} if login is None else set()
    return ConnectionSettings(backend, login, config.model_dump(exclude=left_out))


def _codecs(pickler: Pickler, table: dj.Table) -> list[tuple[str, bytes, bool]]:
    """Pickle each codec on its own: workers may lack those that this run doesn't need."""
    codecs = codecs_beside_datajoints()
    used = codecs_used(table) if codecs else set()
    return [(name, pickler.tried(kind), name in used) for name, kind in codecs.items()]


def _dump_each(pickler: Pickler, values: dict[str, Any], what: str, table: type[Any]) -> None:
    pickler.dump(list(values))
    for name, value in values.items():
        _dump(pickler, value, what.format(name), table)


def _dump(pickler: Pickler, value: Any, what: str, table: type[Any]) -> None:
    try:
        pickler.dump(value)
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(
            f"{what} can't be sent to the workers of {table.__name__}: {type(error).__name__}: {error}. "
            "Let it hold only what can be pickled: no open files, sockets, locks or generators."
        ) from error


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
        return self.sent == _login_of_process()

    def note(self, login: Login | None) -> None:
        if login in (None, self.login):
            return
        if self.login is None or not self.replaced:
            self.login = _configured_login(dj.instance._global_config)
            self.config = dj.instance._global_config.model_dump(include={"database", "stores"})
        self.sent = login


_own = _Own()


def _or_own(settings: ConnectionSettings) -> ConnectionSettings:
    """Where no login comes along, let none that came along earlier serve."""
    if settings.login is not None or not _own.replaced:
        return settings
    return replace(settings, login=_own.login, config={**settings.config, **_own.config})


def _own_login() -> Login:
    """Return the login of this process, which needs no connection for that."""
    login = _login_of_process()
    if login["user"] is None:
        raise WorkerSetupError(
            "no login was sent here (djdist.config.ship_credentials is False) and none is configured: set "
            "DJ_USER and DJ_PASS, or write a datajoint.json, on every node."
        )
    return login


def _login_of_process() -> Login:
    connection = dj.instance._singleton_connection
    return login_of(connection) if connection else _configured_login(dj.instance._global_config)


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


def _shared_connection(settings: ConnectionSettings) -> dj.Connection:
    """Return the connection of ``dj.conn()``, or one in its place where DataJoint is in thread-safe mode."""
    if dj.instance._load_thread_safe():
        login = settings.login or _own_login()
        return open_connection(SHARED, dj.Connection, settings.backend, login, dj.instance._global_config, [])
    return dj.conn()


def _leave_other_database(settings: ConnectionSettings) -> None:
    """Reset DataJoint's connection if it leads elsewhere; tables of another run keep theirs."""
    connection = dj.instance._singleton_connection
    if connection is None:
        return
    if settings.login not in (None, login_of(connection)):
        dj.conn(reset=True)
    else:
        _revive(connection)


def _connect(connection: dj.Connection, settings: ConnectionSettings) -> None:
    """Log in as the caller did."""
    login = login_of(connection)
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
    """Reconnect where the socket is dead, or is a forked process's parent's."""
    if os.getpid() != _process or not is_alive(connection):
        connection.connect()
