"""Watches what DataJoint's own connections wait for, in workers and at the caller.

A server that has fallen silent is waited for no longer than a minute. libpq heeds no signal while it
waits: where a signal is to end the program, the statement is ended.
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from djdist._signals import ends_program
from djdist.database import silence
from djdist.database.dbapi import KEEPALIVE_OF_SERVER, connect, keep_alive, shut
from djdist.database.silence import Line, server_name

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
SIGNAL_SECONDS = 2
"""So long may take what is asked of the server when a signal has come, or to connect."""
ENDING_SECONDS = 15.0
"""What begins this long after a signal belongs to the program's end."""

_waiting: dict[int, "Waiting"] = {}
_known: "WeakKeyDictionary[Any, tuple[Callable[[], Any], str]]" = WeakKeyDictionary()
"""How to reach a connection's server by another one, and the name of a MySQL server."""


_blockers: "WeakKeyDictionary[Any, str]" = WeakKeyDictionary()
"""Who has held up a connection's latest statement that took long."""


class Waiting:
    """That this thread waits for the answer to a statement, as a context."""

    __slots__ = ("began_at", "connection", "doubted")

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.doubted = False

    def __enter__(self) -> None:
        self.began_at = time.monotonic()
        _waiting[threading.get_ident()] = self

    def __exit__(self, *error: object) -> None:
        _waiting.pop(threading.get_ident(), None)

    @property
    def goes_on(self) -> bool:
        """Whether the answer has not come."""
        return any(waiting is self for waiting in list(_waiting.values()))

    @property
    def line(self) -> Line | None:
        """The connection with what is known of it."""
        known = _known.get(self.connection)
        return Line(self.connection, *known) if known else None


def blocker_of(connection: Any) -> str:
    """Return who has held up the connection's latest statement, if that is known."""
    return _blockers.pop(connection, "")


def _note_blocker(waiting: Waiting, blocker: str) -> None:
    logger.warning(blocker)
    _blockers[waiting.connection] = blocker


@contextmanager
def watched(connection: Any, reopen: Callable[[], Any]) -> Iterator[None]:
    """Watch a DataJoint connection, and hear of signals, for a ``with``."""
    with watch(connection, reopen), _watchdog().hearing():
        yield


def watch(connection: Any, reopen: Callable[[], Any]) -> ExitStack:
    """Watch a DataJoint connection, also when it reconnects, until what is returned is closed.

    Parameters
    ----------
    connection : datajoint.Connection
        The connection.
    reopen : callable
        Opens another one of the database's driver.
    """
    stack = ExitStack()
    _introduce(connection._conn, reopen)
    if "_execute_query" in vars(connection):  # it is watched already
        return stack
    execute, adapter = connection._execute_query, connection.adapter
    open_natively, watchdog = adapter.connect, _watchdog()

    def execute_watched(*arguments: Any) -> None:
        with Waiting(connection._conn):
            execute(*arguments)

    def open_in_time(**given: Any) -> Any:
        seconds = SIGNAL_SECONDS if watchdog.is_ending else None
        opened = _opened(adapter.backend, open_natively, given, seconds)
        _introduce(opened, reopen)
        return opened

    stack.enter_context(_set(connection, "_execute_query", execute_watched))
    stack.enter_context(_set(adapter, "connect", open_in_time))
    return stack


def _opened(backend: str, open_natively: Callable[..., Any], given: Any, seconds: int | None) -> Any:
    """Connect as DataJoint does, which would wait for MySQL's greeting without limit."""
    if backend == "mysql":
        login = {**given, "use_tls": given.get("use_tls") or False}
        return connect("mysql", login, given["charset"], seconds)
    return open_natively(**given, **({"connect_timeout": seconds} if seconds else {}))


def _introduce(connection: Any, reopen: Callable[[], Any]) -> None:
    """Get to know a connection, unless it is known, or is gone, as its next statement will tell."""
    if connection in _known:
        return
    _known[connection] = reopen, ""
    with suppress(Exception), Waiting(connection):
        keep_alive(connection)
        _known[connection] = reopen, server_name(connection)
        if not _known[connection][1]:
            connection.cursor().execute(KEEPALIVE_OF_SERVER)


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if vars(owner).get(name) is value and own is None:
            delattr(owner, name)
        elif vars(owner).get(name) is value:
            setattr(owner, name, own)


class _Watchdog:
    """A thread that looks at what is waited for every second, and hears of signals at once."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._signalled_at = float("-inf")
        self._ear, self._bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._other_bell = -1
        threading.Thread(target=self._watch, name="djdist-watchdog", daemon=True).start()

    @property
    def is_ending(self) -> bool:
        """Whether a signal has come that ends the program, or what it does."""
        return time.monotonic() - self._signalled_at < ENDING_SECONDS

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Hear of signals, which Python only notes until the main thread executes Python again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        other_bell = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        if other_bell != self._bell:
            self._other_bell = other_bell
        try:
            yield
        finally:
            signal.set_wakeup_fd(other_bell)

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._ear, select.POLLIN)
        while True:
            if poll.poll(TICK_SECONDS * 1000):
                self._hear(os.read(self._ear, 100))
            for thread, waiting in list(_waiting.items()):
                self._look_at(waiting, is_main=thread == threading.main_thread().ident)

    def _hear(self, numbers: bytes) -> None:
        """Ask PostgreSQL to cancel what the main thread waits for, where a signal is to end it."""
        if self._other_bell != -1:  # such as that of a notebook's event loop
            with suppress(OSError):
                os.write(self._other_bell, numbers)
        if not any(map(ends_program, numbers)):
            return
        self._signalled_at = time.monotonic()
        waiting = _waiting.get(threading.main_thread().ident or 0)
        if waiting and (line := waiting.line):
            line.cancel(lambda: waiting.goes_on)

    def _look_at(self, waiting: Waiting, *, is_main: bool) -> None:
        now = time.monotonic()
        if is_main and self.is_ending and now - max(waiting.began_at, self._signalled_at) >= SIGNAL_SECONDS:
            if waiting.goes_on:
                shut(waiting.connection)
        elif not waiting.doubted and now - waiting.began_at >= silence.DOUBT_SECONDS:
            waiting.doubted = True
            if line := waiting.line:
                line.doubt(lambda: waiting.goes_on, partial(_note_blocker, waiting))


_running: _Watchdog | None = None


def _watchdog() -> _Watchdog:
    global _running
    if _running is None:
        _running = _Watchdog()
    return _running


def _forget_parent() -> None:
    """Leave the parent's thread and its bell alone in a process that make() has forked."""
    global _running
    if _running is not None:
        _running = None
        _waiting.clear()
        with suppress(ValueError):  # in a fork of another thread than the main one
            signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
