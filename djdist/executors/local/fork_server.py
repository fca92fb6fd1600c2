"""A process of its own that has imported what workers need, and forks them when it is asked to.

It starts no thread of Python, and has no connection and nothing of the user's code. This file itself needs
the standard library only.

The server of multiprocessing isn't used: there is one per process, which the user's own code may use, too. It
keeps the variables, the folder and the streams that it was started with, and has each child import the
caller's ``__main__`` first.
"""

import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, invalidate_caches
from multiprocessing.connection import Connection, wait
from typing import NoReturn

IMPORTED = ("djdist.worker", "deepdiff")

MOST_LINES = 4
CHECK_SECONDS = 1.0
IDLE_SECONDS = 120.0
SLOW_SECONDS = 0.05


@dataclass(frozen=True)
class Birth:
    """What a process is to be given.

    Attributes
    ----------
    environment : dict
        All its variables.
    umask : int
        Which rights its files don't get.
    start_method : str or None
        How ``make()`` starts processes of its own, as at the caller.
    key : bytes
        What processes of multiprocessing know each other by.
    streams : tuple of int
        Which of the caller's standard streams have come along.
    """

    environment: dict[str, str]
    umask: int
    start_method: str | None
    key: bytes
    streams: tuple[int, ...]


class _Imported:
    """The modules that the server has imported, never to be looked at by the collector of garbage."""

    def __init__(self) -> None:
        gc.disable()
        for module in IMPORTED:
            import_module(module)
        gc.freeze()
        gc.enable()
        self._files = _files()
        self._trusted_until = 0.0

    def is_as_it_was(self) -> bool:
        """Return whether no file has been changed; where it takes long to tell, once per second."""
        began = time.monotonic()
        if began < self._trusted_until:
            return True
        is_as_it_was = _files() == self._files
        if time.monotonic() - began > SLOW_SECONDS:
            self._trusted_until = time.monotonic() + CHECK_SECONDS
        return is_as_it_was


def serve(control: socket.socket, *, may_fork: bool) -> NoReturn:
    """Fork until the caller is gone, or has asked for nothing for long and all forks are gone.

    Where it may not fork, this becomes the first process that it is asked for.
    """
    caller = os.getppid()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for number in (signal.SIGINT, signal.SIGTERM):  # a group of processes gets them as a whole
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    imported = _Imported()
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, Connection] = {}
    busy_at = time.monotonic()
    is_asked = True
    while children or (is_asked and time.monotonic() - busy_at < IDLE_SECONDS):
        if children:
            busy_at = time.monotonic()
        ready = wait([woken, *([control] if is_asked else [])], CHECK_SECONDS)
        if os.getppid() != caller:
            break
        if woken in ready:
            os.read(woken, 1000)
        _bury(children)
        if control in ready:
            byte, lines, *_ = socket.recv_fds(control, 1, MOST_LINES)
            is_asked = bool(byte) and imported.is_as_it_was()
            if not is_asked:
                control.close()  # whoever asks from now on sees that nobody answers
            elif may_fork:
                _fork(lines, children, (control.fileno(), woken, waker))
            else:
                news = Connection(lines[1], readable=False)  # its end will tell of this process's
                _tell(news, os.getpid())
                _live(lines, (control.fileno(), woken, waker), caller)
            for line in lines[:1] + lines[2:] if is_asked else lines:
                os.close(line)
    os._exit(0)


def _files() -> dict[str, float]:
    """Return when the file of each imported module came to its name: no copying of dates can hide that."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return {file: _changed_at(file) for file in files if isinstance(file, str)}


def _changed_at(file: str) -> float:
    with suppress(OSError, ValueError):  # it may be a name only, or within a zip
        return os.stat(file).st_ctime
    return 0.0


def _bury(children: dict[int, Connection]) -> None:
    """Tell the caller which forks have ended, and how."""
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            _tell(children.pop(pid), os.waitstatus_to_exitcode(status))


def _fork(lines: list[int], children: dict[int, Connection], own: tuple[int, ...]) -> None:
    """Fork a process; the first of the lines is its own, the second is for news of it."""
    server = os.getpid()
    pid = os.fork()
    if not pid:
        _live(lines, (*own, lines[1], *(child.fileno() for child in children.values())), server)
    children[pid] = Connection(lines[1], readable=False)
    _tell(children[pid], pid)


def _tell(news: Connection, number: int) -> None:
    with suppress(OSError):  # the caller doesn't want to know
        news.send(number)


def _live(lines: list[int], not_its_own: tuple[int, ...], parent: int) -> NoReturn:
    """Be what the caller has asked for, to the end of this process."""
    try:
        for line in lines:
            os.set_inheritable(line, False)  # what make() starts must not hold them open
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for fd in not_its_own:
            os.close(fd)
        to_caller = Connection(lines[0])
        _be_born(to_caller.recv(), lines[2:], parent)
        _work(to_caller)
    finally:
        os._exit(1)


def _be_born(birth: Birth, streams: list[int], parent: int) -> None:
    """Become a process as a new one would be, which shares nothing with its siblings."""
    for stream, given in zip(birth.streams, streams, strict=True):
        os.dup2(given, stream)
        os.close(given)
    os.environ.clear()
    os.environ.update(birth.environment)
    os.umask(birth.umask)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # or all forks would draw the same numbers
    if packing := sys.modules.get("djdist.shipping.packing"):
        packing.begin_process()
    multiprocessing.current_process().authkey = birth.key
    multiprocessing.set_start_method(birth.start_method, force=True)
    threading.Thread(target=_end_with, args=(parent,), name="djdist-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its server has, which ends with the caller, however that ended."""
    while os.getppid() == parent:
        time.sleep(CHECK_SECONDS)
    os._exit(1)


def _work(line: Connection) -> None:
    """Do what comes until the caller has no more."""
    os.register_at_fork(after_in_child=line.close)  # or the caller wouldn't see that this process has died
    with suppress(EOFError, OSError):
        while request := line.recv_bytes():
            invalidate_caches()
            line.send_bytes(_answer(request))
            del request
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)


def _answer(request: bytes) -> bytes:
    try:
        work, jobs = pickle.loads(request)
        answer = pickle.dumps((True, work(jobs)))
    except BaseException as error:
        answer = pickle.dumps((False, f"{type(error).__name__}: {error}"))
    with suppress(Exception):
        sys.stdout.flush()
    return answer
