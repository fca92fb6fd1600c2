"""SIGINT and SIGTERM while populate() runs: remembered, so that they are no errors of make()."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from djdist.errors import Terminated


class Signals:
    """Knows whether a signal has come."""

    def __init__(self) -> None:
        self.received = False

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal as Python does for SIGINT, and remember it."""
        self.received = True
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated("SIGTERM received")


@contextmanager
def catching(*numbers: signal.Signals) -> Iterator[Signals]:
    """Handle these signals for a while; only a main thread may, elsewhere nothing changes."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    handlers = {number: signal.signal(number, signals.interrupt) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
