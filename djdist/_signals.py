"""SIGINT and SIGTERM while populate() runs: remembered, so that they are no errors of make()."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from djdist.errors import Terminated


class Signals:
    """Knows whether a signal has come.

    Parameters
    ----------
    around : Signals, optional
        Those of the ``make()`` from within which a table is populated: a signal ends both.
    """

    def __init__(self, around: "Signals | None" = None) -> None:
        self.received = False
        self._around = around
        self._on_sigint = signal.getsignal(signal.SIGINT)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT as the program does, which may go on, and SIGTERM by an exit; remember an end."""
        try:
            if number == signal.SIGTERM:
                raise Terminated("SIGTERM received")
            (self._on_sigint if callable(self._on_sigint) else signal.default_int_handler)(number, frame)
        except (KeyboardInterrupt, SystemExit):
            self._note()
            raise

    def ends_program(self, number: int) -> bool:
        """Return whether such a signal ends what it interrupts; a program's own handler may go on."""
        own_handler = callable(self._on_sigint) and self._on_sigint is not signal.default_int_handler
        return number == signal.SIGTERM or not own_handler

    def _note(self) -> None:
        self.received = True
        if self._around:
            self._around._note()


@contextmanager
def catching(*numbers: signal.Signals) -> Iterator[Signals]:
    """Handle these signals for a while, but for those that the process ignores or handles outside Python.

    Only a main thread may; elsewhere nothing changes.
    """
    signals = Signals(_handling(numbers))
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    # None: a handler that Python doesn't know, such as one of a library in C, couldn't be put back
    heeded = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    handlers = {number: signal.signal(number, signals.interrupt) for number in heeded}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ends_program(number: int) -> bool:
    """Return whether a signal that was just received ends what it interrupts, as far as that is known."""
    handler = signal.getsignal(number)
    owner = getattr(handler, "__self__", None)
    return owner.ends_program(number) if isinstance(owner, Signals) else handler is signal.default_int_handler


def signal_behind(error: BaseException | None) -> BaseException | None:
    """Find the end by a signal that an error came of, such as one of the database while a run is ended."""
    while error and not isinstance(error, KeyboardInterrupt | SystemExit):
        error = error.__context__
    return error


def _handling(numbers: Sequence[signal.Signals]) -> Signals | None:
    """Return what handles one of these signals already."""
    owners = [getattr(signal.getsignal(number), "__self__", None) for number in numbers]
    return next((owner for owner in owners if isinstance(owner, Signals)), None)


_forking = threading.local()


# SIGTERM is blocked around a fork, because the child inherits Python's handler: a signal that comes before
# the child has its own would be noted in a process that never looks for it.


def _hold_back_sigterm() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _let_sigterm_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _end_by_sigterm() -> None:
    """Restore the default of SIGTERM in what make() has forked.

    Python forgets a signal that meets a child with a handler in its first moment, and a pool of
    make()'s that is over at once would wait forever for that child.
    """
    if isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Signals):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_sigterm_through()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_hold_back_sigterm, after_in_parent=_let_sigterm_through, after_in_child=_end_by_sigterm
    )
