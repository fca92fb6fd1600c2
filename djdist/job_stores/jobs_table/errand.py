"""What is done in a thread of its own, which can be left with it.

libpq heeds no signal while it waits for an answer, and no driver heeds a run that is to end.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Errand(Generic[Result]):
    """Something that a hand does."""

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

    def do(self) -> None:
        """Do it, in the hand's thread."""
        try:
            result = self._act()
        except BaseException as error:
            self._outcome = _raising(error)
        else:
            self._outcome = lambda: result
        self._done.set()


class Hand:
    """Does one errand after another in a thread that keeps no process from ending."""

    def __init__(self) -> None:
        self._errands: SimpleQueue[Errand[Any] | None] = SimpleQueue()
        threading.Thread(target=self._do_all, name="djdist-database", daemon=True).start()

    def begin(self, act: Callable[[], Result]) -> Errand[Result]:
        """Begin an errand."""
        errand = Errand(act)
        self._errands.put(errand)
        return errand

    def let_go(self) -> None:
        """End its thread after what it does now."""
        self._errands.put(None)

    def _do_all(self) -> None:
        while errand := self._errands.get():
            errand.do()
            del errand


def _raising(error: BaseException) -> Callable[[], Any]:
    def again() -> Any:
        raise error

    return again
