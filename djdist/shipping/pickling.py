"""How DataJoint's objects are pickled for workers, and unpickled there."""

import inspect
import io
import os
import pickle
import types
from collections.abc import Callable
from contextlib import suppress
from copyreg import __newobj__  # type: ignore[attr-defined]
from typing import Any

import cloudpickle
import datajoint as dj

from djdist.database.dbapi import Login, keep_alive
from djdist.errors import OptionError
from djdist.shipping.bindings import register, tables

OWN_CONNECTION, SHARED_CONNECTION = "own connection", "shared connection"
OWN_SETTINGS, SHARED_SETTINGS = "own settings", "shared settings"
NAMESPACE = "namespace"
OWN, SHARED = 0, -1
"""Numbers of connections; further ones count from 1."""

_opened: dict[tuple[int, int], dj.Connection] = {}


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles what travels; several dumps share the objects that they have in common.

    The table's own connection and the one of ``dj.conn()`` are those of the worker there.
    Any other travels as its settings. Namespaces, which belong to a process, stay behind.

    Parameters
    ----------
    own : datajoint.Connection
        The connection of the table that is populated.
    ship_credentials : bool
        Whether settings of connections may travel.
    """

    def __init__(self, own: dj.Connection, *, ship_credentials: bool = True) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file)
        self._own, self._own_settings = own, own._config
        self._ship_credentials = ship_credentials
        self._known = [own]
        contexts = [t.__dict__.get("declaration_context") for t in tables(dj.Table)]
        self._contexts = {id(context): context for context in contexts}  # held, or others could get their ids

    @property
    def pickled(self) -> bytes:
        """All dumps so far."""
        return self._file.getvalue()

    def tried(self, obj: Any) -> bytes:
        """Pickle an object on its own: what fails in a dump would spoil those that follow."""
        pickler = Pickler(self._own, ship_credentials=self._ship_credentials)
        pickler.dump(obj)
        return pickler.pickled

    def dump_own_connection(self) -> None:
        """Dump what opens the table's own connection where that is not the one of ``dj.conn()``."""
        shared = dj.instance._singleton_connection
        if self._ship_credentials:
            self.dump(None if self._own is shared else self._opening(self._own))
        elif shared is None or self._own == shared:  # the same login does, as after dj.conn(reset=True)
            self.dump(None)
        else:
            raise self._refusal(self._own)

    def persistent_id(self, obj: Any) -> str | None:
        """Return a name for what the worker has itself."""
        if isinstance(obj, dict):
            return NAMESPACE if "__builtins__" in obj or id(obj) in self._contexts else None
        if obj is self._own:
            return OWN_CONNECTION
        if obj is self._own_settings:
            return SHARED_SETTINGS if obj is dj.instance._global_config else OWN_SETTINGS
        if isinstance(obj, dj.Connection) and obj is dj.instance._singleton_connection:
            return SHARED_CONNECTION
        return SHARED_SETTINGS if obj is dj.instance._global_config else None

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what pickle can't, or what would take a process's state along."""
        if isinstance(obj, dj.Connection):
            if not self._ship_credentials:
                raise self._refusal(obj)
            return open_connection, self._opening(obj)
        if isinstance(obj, dj.instance.Config) and not self._ship_credentials:
            raise self._refusal(obj)
        if obj is dj.config:
            return getattr, (dj, "config")
        if isinstance(obj, dj.schemas._Schema):
            return __newobj__, (type(obj),), {**vars(obj), "context": None, "declare_list": []}
        if isinstance(obj, dj.VirtualModule):
            return _new_virtual_module, (type(obj), obj.__name__), vars(obj).copy()
        reduced = super().reducer_override(obj)
        if inspect.isclass(obj) and issubclass(obj, dj.Codec) and reduced is not NotImplemented:
            make, arguments, *rest = reduced
            return _new_codec_class, (make, *arguments), *rest
        return reduced

    def _opening(self, connection: dj.Connection) -> tuple[Any, ...]:
        if not any(connection is known for known in self._known):
            self._known.append(connection)
        number = next(n for n, known in enumerate(self._known) if connection is known)
        backend, login = connection.adapter.backend, login_of(connection)
        return number, type(connection), backend, login, connection._config, sorted(connection.schemas)

    def _refusal(self, obj: Any) -> OptionError:
        info = getattr(obj, "conn_info", None)
        what = f"connection, {info['user']}@{info['host']}:{info['port']}," if info else "dj.Instance"
        return OptionError(
            f"make() uses a further {what} which the workers can't open: djdist.config.ship_credentials is "
            "False. Set it to True, or open that connection in a module that the workers import."
        )


class Unpickler(pickle.Unpickler):
    """Unpickles, one after the other, what a :class:`Pickler` has dumped.

    Parameters
    ----------
    pickled : bytes
        The dumps.
    shared : callable
        Gives the connection of ``dj.conn()``.
    """

    def __init__(self, pickled: bytes, shared: Callable[[], dj.Connection]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._shared = shared
        self._opening: tuple[Any, ...] | None = None
        self.own: dj.Connection | None = None

    def load_own_connection(self) -> None:
        """Load what opens the table's own connection, if it must be opened."""
        self._opening = self.load()

    def loads(self, pickled: bytes) -> Any:
        """Unpickle what was :meth:`Pickler.tried`."""
        unpickler = Unpickler(pickled, self._shared)
        unpickler.own, unpickler._opening = self.own, self._opening
        return unpickler.load()

    def persistent_load(self, pid: str) -> Any:
        """Return what this process has itself."""
        if pid == NAMESPACE:
            return {}
        if pid == SHARED_SETTINGS:
            return dj.instance._global_config
        if pid == SHARED_CONNECTION:
            return self._shared()
        if self.own is None:
            self.own = open_connection(*self._opening) if self._opening else self._shared()
        return self.own if pid == OWN_CONNECTION else self.own._config


def login_of(connection: dj.Connection) -> Login:
    """Return how a connection was opened."""
    info = connection.conn_info
    return {
        "host": info["host"],
        "port": info["port"],
        "user": info["user"],
        "password": info["passwd"],
        "database_name": info["database_name"],
        "use_tls": info["ssl_input"],
    }


def open_connection(
    number: int, kind: type[dj.Connection], backend: str, login: Login, config: Any, schemas: list[str]
) -> dj.Connection:
    """Open a connection of the caller's again; the next run in this process uses it, too."""
    connection = _opened.get((os.getpid(), number))
    if connection and (login_of(connection), connection.adapter.backend) == (login, backend):
        connection._config = config
        _reopen(connection)
    else:
        place = login["host"], login["user"], login["password"], login["port"], login["use_tls"]
        options = {"database_name": login["database_name"], "backend": backend, "config_override": config}
        connection = _opened[os.getpid(), number] = object.__new__(kind)
        dj.Connection.__init__(connection, *place, **options)
    keep_alive(connection._conn)
    register(connection, schemas)
    return connection


def _reopen(connection: dj.Connection) -> None:
    """Begin a session that holds nothing."""
    with suppress(Exception):
        connection.close()
    connection.connect()
    connection._in_transaction = False


def _new_virtual_module(kind: type[dj.VirtualModule], name: str) -> dj.VirtualModule:
    module = types.ModuleType.__new__(kind)
    types.ModuleType.__init__(module, name)
    return module


def _new_codec_class(
    make: Callable[..., Any], kind: Any, name: str, bases: Any, body: Any, *rest: Any
) -> Any:
    """Make a class whose attributes come later; DataJoint would register it by a name that is inherited."""
    made = make(kind, name, bases, {**body, "name": None}, *rest)
    if "name" in vars(made):
        del made.name
    return made
