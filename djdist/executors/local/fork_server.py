"""A process of its own that has imported what workers need, and forks them when it is asked to.

It has one thread, no connection and nothing of the user's code. Until it is asked it imports no more than
this file does, which itself needs the standard library only.
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

IMPORTED = ("djdist.worker", "deepdiff") if sys.platform == "linux" else ()
"""What is imported before a fork: libraries of other systems may not stand one."""

MOST_LINES = 4
CHECK_SECONDS = 1.0
SERVER_IDLE_SECONDS = 120.0
WORKER_IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class Birth:
    """What a process is to be given.

    Attributes
    ----------
    environment : dict
        Variables that differ from the server's.
    start_method : str or None
        How ``make()`` starts processes of its own, as at the caller.
    key : bytes
        What processes of multiprocessing know each other by.
    streams : tuple of int
        Which of the caller's standard streams have come along.
    """

    environment: dict[str, str]
    start_method: str | None
    key: bytes
    streams: tuple[int, ...]


def serve(control: socket.socket) -> NoReturn:
    """Fork until the caller is gone, or has asked for nothing for long and all forks are gone."""
    caller = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):  # a group of processes gets them as a whole
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    gc.disable()
    for module in IMPORTED:
        import_module(module)
    imported = _files()
    gc.freeze()
    gc.enable()
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, Connection] = {}
    asked_at = time.monotonic()
    is_asked = True
    while children or (is_asked and time.monotonic() - asked_at < SERVER_IDLE_SECONDS):
        ready = wait([woken, *([control] if is_asked else [])], CHECK_SECONDS)
        if os.getppid() != caller:
            break
        if woken in ready:
            os.read(woken, 1000)
        _bury(children)
        if control in ready:
            byte, lines, *_ = socket.recv_fds(control, 1, MOST_LINES)
            is_asked, asked_at = bool(byte) and _files() == imported, time.monotonic()
            if is_asked:
                _fork(lines, children, (control.fileno(), woken, waker))
            else:
                control.close()  # whoever asks from now on sees that nobody answers
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
            with suppress(OSError):  # the caller doesn't want to know
                children.pop(pid).send(os.waitstatus_to_exitcode(status))


def _fork(lines: list[int], children: dict[int, Connection], own: tuple[int, ...]) -> None:
    """Fork a process; the first of the lines is its own, the second is for news of it."""
    for line in lines:
        os.set_inheritable(line, False)  # what make() starts must not hold them open
    news = Connection(lines[1], readable=False)
    server = os.getpid()
    pid = os.fork()
    if not pid:
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            for fd in (*own, lines[1], *(child.fileno() for child in children.values())):
                os.close(fd)
            to_caller = Connection(lines[0])
            _be_born(to_caller.recv(), lines[2:], server)
            _work(to_caller)
        finally:
            os._exit(1)
    children[pid] = news
    with suppress(OSError):
        news.send(pid)


def _be_born(birth: Birth, streams: list[int], server: int) -> None:
    """Become a process as a new one would be, which shares nothing with its siblings."""
    for stream, given in zip(birth.streams, streams, strict=True):
        os.dup2(given, stream)
        os.close(given)
    os.environ.update(birth.environment)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # or all forks would draw the same numbers
    if packing := sys.modules.get("djdist.shipping.packing"):
        packing.begin_process()
    multiprocessing.current_process().authkey = birth.key
    multiprocessing.set_start_method(birth.start_method, force=True)
    threading.Thread(target=_end_with, args=(server,), name="djdist-parent", daemon=True).start()


def _end_with(server: int) -> None:
    """End this process when its server has, which ends with the caller, however that ended."""
    while os.getppid() == server:
        time.sleep(CHECK_SECONDS)
    os._exit(1)


def _work(line: Connection) -> None:
    """Do what comes until the caller has no more, or for long nothing has come."""
    os.register_at_fork(after_in_child=line.close)  # or the caller wouldn't see that this process has died
    while line.poll(WORKER_IDLE_SECONDS):
        try:
            request = line.recv_bytes()
        except (EOFError, OSError):
            break
        invalidate_caches()
        line.send_bytes(_answer(request))
        del request
    with suppress(OSError):
        line.send_bytes(b"")  # what was sent meanwhile has not been begun
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
