"""Where a run stands on its way to its end."""

import threading
import time
from collections.abc import Callable


class Shutdown:
    """Says whether a run goes on, is stopping, or is cut; all parts of its driver and who serves it ask it.

    Parameters
    ----------
    clock : callable
        Seconds that pass.

    Attributes
    ----------
    is_stopping : bool
        Nothing more begins; what runs may finish.
    is_forsaken : bool
        It stops for want of its caller, which may come back and go on with the run elsewhere.
    over : threading.Event
        The run has come to its end, so that no thread of it needs to go on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cut_at = self._patient_until = float("inf")
        self.is_stopping = self.is_forsaken = False
        self.over = threading.Event()

    def stop(self, grace_seconds: float | None = None) -> bool:
        """Begin nothing more, and end what runs after the grace; return whether this is new."""
        if grace_seconds is not None:
            self._cut_at = min(self._cut_at, self._clock() + grace_seconds)
        is_new, self.is_stopping = not self.is_stopping, True
        return is_new

    def forsake(self) -> bool:
        """Stop for want of a caller; return whether nobody has stopped it before."""
        if is_new := self.stop():
            self.is_forsaken = True
        return is_new

    @property
    def seconds_left(self) -> float:
        """For how long what runs may go on."""
        return self._cut_at - self._clock()

    @property
    def is_cut(self) -> bool:
        """Whether what runs is to be ended."""
        return self.seconds_left <= 0

    def end_patience(self, grace_seconds: float) -> None:
        """Wait for a database that is away no longer than the grace."""
        self._patient_until = min(self._patient_until, self._clock() + grace_seconds)

    @property
    def is_patient(self) -> bool:
        """Whether a database that is away is worth waiting for."""
        return self._clock() < self._patient_until
