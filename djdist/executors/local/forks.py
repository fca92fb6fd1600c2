"""Processes that are forked from a server that has imported what they need, not from this process."""

import atexit
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loky.backend.utils import kill_process_tree

from djdist._settings import config
from djdist.executors.local.fork_server import Birth

START = "import sys; exec(eval(sys.stdin.readline()))  # djdist.executors.local.fork_server"
CODE = """
sys.path[:], sys.argv[:] = {path!r}, {argv!r}
import socket
from djdist.executors.local.fork_server import serve
serve(socket.socket(fileno={fd}), may_fork={may_fork})
"""
MAY_FORK = sys.platform == "linux"
"""The libraries of other systems may not stand a fork."""

STREAMS = (1, 2)
MOST_SERVERS = 2
END_SECONDS = 10.0
BLOCKED = (signal.SIGINT, signal.SIGTERM)
READ_AT_START = re.compile(
    "LD_|DYLD_|GLIBC_|MALLOC_|PYTHON|LANG|LC_|TZ|HOME|PATH|TMP|TEMP|XDG_"
    "|OMP_|GOMP_|KMP_|MKL_|OPENBLAS_|GOTO_|BLIS_|VECLIB_|NVPL_|NUMBA_|NUMEXPR_"
    "|DJ_|DJDIST_|NPY_|NUMPY_|PANDAS_|NETWORKX_|PYDANTIC_|PYPARSING|FSSPEC_",
    re.IGNORECASE,
)
"""How variables begin that Python, or what the server imports, reads once and for all."""


class NotBornError(Exception):
    """The server has ended before it forked."""


class Fork:
    """A process of its own, and the two lines to it: one for work, one for news of it.

    Parameters
    ----------
    environment : dict
        Its variables.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.pid = 0
        self.exit_code: int | None = None
        self._is_unwanted = False
        self._reading = threading.RLock()
        self._line, of_worker = multiprocessing.Pipe()
        self._news, of_server = multiprocessing.Pipe(duplex=False)
        streams = _open_streams()
        process = multiprocessing.current_process()
        start_method = multiprocessing.get_start_method(allow_none=True)
        self._line.send(Birth(environment, _umask(), start_method, bytes(process.authkey), tuple(streams)))
        with of_worker, of_server, _serving:
            self._server = start_server(environment)
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

    def _received_exit_code(self) -> int | None:
        with suppress(EOFError, OSError):
            if self._news.poll(END_SECONDS):
                return int(self._news.recv())
        with suppress(OSError):  # it has closed its line and lives, or its server has ended, too
            os.kill(self.pid, signal.SIGKILL)
        return self._server.exit_code(self.pid)

    def kill(self) -> None:
        """End the process and those that it has started, and wait until it has ended."""
        self._is_unwanted = True
        if not self.pid:
            self._line.close()  # when it is born, it will find nothing to do
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
        argv, fd = list(map(str, sys.argv)), of_server.fileno()
        code = CODE.format(path=paths, argv=argv, fd=fd, may_fork=MAY_FORK)
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        # until it ignores them itself: a Ctrl-C at the terminal reaches it, too
        blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
        try:
            with of_server:
                self._process = subprocess.Popen(
                    [sys.executable, *flags, "-c", START],
                    env=environment,
                    pass_fds=[fd],
                    stdin=subprocess.PIPE,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        # or what has ended would stay as a zombie
        threading.Thread(target=self._process.wait, name="djdist-server", daemon=True).start()
        assert self._process.stdin
        with suppress(OSError), self._process.stdin as stdin:  # no argument could be so long
            stdin.write(f"{code!a}\n".encode())

    @property
    def is_there(self) -> bool:
        return self._control.fileno() >= 0 and self._process.poll() is None

    def fork(self, lines: list[int]) -> None:
        with suppress(OSError):  # it has ended just now, which the lines will tell
            socket.send_fds(self._control, [b"f"], lines)
        if not MAY_FORK:
            self.close()  # it is that process itself now

    def exit_code(self, pid: int) -> int | None:
        """Return how it ended, if it was itself the process of that number."""
        return self._process.wait() if pid == self._process.pid else None

    def close(self) -> None:
        self._control.close()


_servers: dict[Any, _Server] = {}
_serving = threading.RLock()


def start_server(environment: dict[str, str]) -> _Server:
    """Return the server that has imported in such an environment, or start one."""
    key = surroundings(environment)
    with _serving:
        server = _servers.pop(key, None)
        if server and not server.is_there:
            server.close()
            server = None
        server = server or _Server(environment)
        _servers[key] = server  # the last ones stay
        for other in list(_servers)[:-MOST_SERVERS]:
            _servers.pop(other).close()
        return server


def _forget() -> None:
    """Let the servers go: this process has none, or no more."""
    global _serving
    _serving = threading.RLock()
    for server in _servers.values():
        server.close()
    _servers.clear()


os.register_at_fork(after_in_child=_forget)
atexit.register(_forget)


def surroundings(environment: dict[str, str]) -> Any:
    """Return what a process is born into; what was born into the same serves as a new one does."""
    own_login = None if config.ship_credentials else object()  # each reads its own, which may change
    limits = [resource.getrlimit(number) for name, number in vars(resource).items() if "RLIMIT_" in name]
    affinity = getattr(os, "sched_getaffinity", lambda pid: ())(0)
    user = os.getuid(), os.getgid(), os.getpriority(os.PRIO_PROCESS, 0)
    variables = sorted(item for item in environment.items() if READ_AT_START.match(item[0]))
    lists = sys.path, sys.argv, sys.warnoptions, limits, affinity, variables
    return own_login, user, _folder(), *map(tuple, lists)


def _folder() -> Any:
    try:
        folder = os.stat(".")  # not by its name, which another one may have by now
    except OSError:
        return object()
    return folder.st_dev, folder.st_ino


def _umask() -> int:
    with suppress(OSError):
        if found := re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1], 8)
    with _serving:  # there is no other way to ask for it
        umask = os.umask(0o077)
        os.umask(umask)
        return umask


def _open_streams() -> list[int]:
    return [stream for stream in STREAMS if _is_open(stream)]


def _is_open(stream: int) -> bool:
    try:
        os.fstat(stream)
    except OSError:
        return False
    return True
