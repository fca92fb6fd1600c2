"""Calls in a thread of their own, which can be left behind with it.

libpq heeds no signal while it waits for an answer, and no driver heeds a run that is to end. An executor of
concurrent.futures wouldn't do: Python waits for its threads before it ends.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class BackgroundCall(Generic[Result]):
    """A call that a thread carries out."""

    def __init__(self, act: Callable[[], Result]) -> None:
        self._act = act
        self._done = threading.Event()
        self._outcome: Callable[[], Result]

    def wait(self, seconds: float) -> bool:
        """Wait for its end, at most this long, and return whether it has come."""
        return self._done.wait(seconds)

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self._done.is_set()

    def result(self) -> Result:
        """Return what it gave, or raise what it raised."""
        return self._outcome()

    def carry_out(self) -> None:
        """Carry it out, in its thread."""
        try:
            result = self._act()
        except BaseException as error:
            self._outcome = _raising(error)
        else:
            self._outcome = lambda: result
        self._done.set()


class BackgroundThread:
    """Carries out one call after another in a thread that keeps no process from ending."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[BackgroundCall[Any] | None] = SimpleQueue()
        threading.Thread(target=self._carry_out_all, name="djdist-database", daemon=True).start()

    def begin(self, act: Callable[[], Result]) -> BackgroundCall[Result]:
        """Begin a call."""
        call = BackgroundCall(act)
        self._calls.put(call)
        return call

    def stop(self) -> None:
        """End the thread after what it does now."""
        self._calls.put(None)

    def _carry_out_all(self) -> None:
        while call := self._calls.get():
            call.carry_out()
            del call


def _raising(error: BaseException) -> Callable[[], Any]:
    def again() -> Any:
        raise error

    return again
