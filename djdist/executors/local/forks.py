"""Processes that are forked from a server that has imported what they need, not from this process."""

import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from types import SimpleNamespace
from typing import Any

from loky.backend.utils import kill_process_tree

from djdist._settings import config
from djdist.executors.local.fork_server import Birth

CODE = """
import sys
sys.path[:], sys.argv[:] = {path!r}, {argv!r}
import socket
from djdist.executors.local.fork_server import serve
serve(socket.socket(fileno={fd}))
"""
STREAMS = (1, 2)
MOST_SERVERS = 4
END_SECONDS = 10.0
BLOCKED = (signal.SIGINT, signal.SIGTERM)
UNKNOWN = 255
"""Stands for how a process ended of which its server can't tell."""


class NotBornError(Exception):
    """The server has ended before it forked."""


class Fork:
    """A process of its own, and the two lines to it: one for work, one for news of it.

    Parameters
    ----------
    environment : dict
        Variables of its environment that are read as it starts, such as limits of threads.
    later : dict
        Variables that are read later.
    """

    def __init__(self, environment: dict[str, str], later: dict[str, str]) -> None:
        self.pid = 0
        self.exit_code: int | None = None
        self._is_unwanted = False
        self._reading = threading.RLock()
        self._socket, of_worker = socket.socketpair()
        self._line = Connection(os.dup(self._socket.fileno()))
        self._news, of_server = multiprocessing.Pipe(duplex=False)
        streams = _open_streams()
        process = multiprocessing.current_process()
        start_method = multiprocessing.get_start_method(allow_none=True)
        self._line.send(Birth(later, start_method, bytes(process.authkey), tuple(streams)))
        self._server = start_server(environment)
        with of_worker, of_server:
            self._server.fork([of_worker.fileno(), of_server.fileno(), *streams])

    def exchange(self, request: bytes) -> bytes:
        """Send a request and return the answer; nothing, if the process had left before it came.

        Raises
        ------
        NotBornError
            There is no such process, and never was.
        EOFError
            It died.
        """
        self._await_birth()
        if self._is_unwanted:
            raise EOFError
        if self.has_ended:
            return b""
        with suppress(OSError):
            self._line.send_bytes(request)
        if self._line in wait([self._line, self._news]):
            with suppress(OSError, EOFError):
                return self._line.recv_bytes()
        self._await_end()
        raise EOFError

    def _await_birth(self) -> None:
        with self._reading:
            if not self.pid:
                try:
                    self.pid = self._news.recv()
                except (EOFError, OSError) as error:
                    self._server.close()
                    raise NotBornError from error

    def _await_end(self) -> None:
        with self._reading:
            if self.exit_code is None:
                self.exit_code = self._received_exit_code()

    def _received_exit_code(self) -> int:
        with suppress(EOFError, OSError):
            if self._news.poll(END_SECONDS):
                return int(self._news.recv())
        with suppress(
            OSError
        ):  # it has closed its line and lives, or its server has ended, which it will follow
            os.kill(self.pid, signal.SIGKILL)
        return UNKNOWN

    def kill(self) -> None:
        """End the process and those that it has started, and wait until it has ended."""
        self._is_unwanted = True
        if not self.pid:
            with suppress(OSError):  # when it is born, it will find nothing to do
                self._socket.shutdown(socket.SHUT_RDWR)
        elif not self.has_ended:
            kill_process_tree(SimpleNamespace(pid=self.pid, join=self._await_end, kill=lambda: None))

    @property
    def has_ended(self) -> bool:
        """Whether it was there and is no more, so that its number may be another's."""
        with self._reading:
            return self.exit_code is not None or self._news.poll()


class _Server:
    """A server as its caller sees it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._control, of_server = socket.socketpair()
        paths = [path for path in sys.path if isinstance(path, str)]  # Python heeds no others
        code = CODE.format(path=paths, argv=list(map(str, sys.argv)), fd=of_server.fileno())
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        # until it ignores them itself: a Ctrl-C at the terminal reaches it, too
        blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
        try:
            with of_server:
                self._process = subprocess.Popen(
                    [sys.executable, *flags, "-c", code],
                    env=environment,
                    pass_fds=[of_server.fileno()],
                    stdin=subprocess.DEVNULL,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)

    @property
    def is_there(self) -> bool:
        return self._control.fileno() >= 0 and self._process.poll() is None

    def fork(self, lines: list[int]) -> None:
        with suppress(OSError):  # it has ended just now, which the lines will tell
            socket.send_fds(self._control, [b"f"], lines)

    def close(self) -> None:
        self._control.close()


_servers: dict[Any, _Server] = {}
_serving = threading.Lock()


def start_server(environment: dict[str, str]) -> _Server:
    """Return the server that has imported in such an environment, or start one."""
    key = surroundings(environment)
    with _serving:
        server = _servers.pop(key, None)
        if server is None or not server.is_there:
            server = _Server(environment)
        _servers[key] = server  # the last ones stay
        for other in list(_servers)[:-MOST_SERVERS]:
            _servers.pop(other).close()
        return server


def _forget() -> None:
    """Leave the servers to the process that has started them: this one is a fork of it."""
    global _serving
    _serving = threading.Lock()
    for server in _servers.values():
        server.close()
    _servers.clear()


os.register_at_fork(after_in_child=_forget)


def surroundings(environment: dict[str, str]) -> Any:
    """Return what a process is born into; what was born into the same serves as a new one does."""
    own_login = None if config.ship_credentials else object()  # each reads its own, which may change
    limits = [resource.getrlimit(number) for name, number in vars(resource).items() if "RLIMIT_" in name]
    affinity = getattr(os, "sched_getaffinity", lambda pid: ())(0)
    user = os.getuid(), os.getgid(), os.getpriority(os.PRIO_PROCESS, 0)
    lists = sys.path, sys.argv, sys.warnoptions, limits, affinity, environment.items()
    return own_login, user, _folder(), *map(tuple, lists)


def streams() -> Any:
    """Return where this process's output goes, as far as it can be told."""
    return [(stat.st_dev, stat.st_ino) for stat in map(os.fstat, _open_streams())]


def _folder() -> Any:
    try:
        return os.getcwd()
    except OSError:  # it is gone
        return object()


def _open_streams() -> list[int]:
    return [stream for stream in STREAMS if _is_open(stream)]


def _is_open(stream: int) -> bool:
    try:
        os.fstat(stream)
    except OSError:
        return False
    return True
