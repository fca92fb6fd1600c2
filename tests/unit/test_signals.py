from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from djdist._signals import catching
from djdist.errors import Terminated

SECONDS = 10


def send(number: signal.Signals) -> None:
    """Send this process a signal, and wait until it has come."""
    os.kill(os.getpid(), number)
    time.sleep(SECONDS)


def test_sigterm_raises_and_is_remembered() -> None:
    with pytest.raises(Terminated, match="SIGTERM"), catching(signal.SIGTERM) as signals:
        send(signal.SIGTERM)
    assert signals.received


def test_sigint_raises_and_is_remembered() -> None:
    with pytest.raises(KeyboardInterrupt), catching(signal.SIGINT) as signals:
        send(signal.SIGINT)
    assert signals.received


def test_nothing_is_remembered_when_nothing_comes() -> None:
    with catching(signal.SIGINT, signal.SIGTERM) as signals:
        pass
    assert not signals.received


def test_an_interrupt_that_code_raises_is_no_signal() -> None:
    with pytest.raises(KeyboardInterrupt), catching(signal.SIGINT) as signals:
        raise KeyboardInterrupt
    assert not signals.received


def test_only_the_given_signals_are_caught() -> None:
    before = signal.getsignal(signal.SIGINT)
    with catching(signal.SIGTERM):
        assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_put_back_also_after_a_signal(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises((KeyboardInterrupt, Terminated)), catching(number):
        send(number)
    assert signal.getsignal(number) is before
    with catching(number):
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before


def test_an_inner_one_gives_back_to_the_outer_one() -> None:
    with catching(signal.SIGTERM) as outer:
        with catching(signal.SIGTERM):
            pass
        with pytest.raises(Terminated):
            send(signal.SIGTERM)
        assert outer.received


def test_the_outer_one_knows_what_has_met_an_inner_one() -> None:
    with catching(signal.SIGINT, signal.SIGTERM) as outer:
        with pytest.raises(Terminated), catching(signal.SIGTERM) as inner:
            send(signal.SIGTERM)
        assert (inner.received, outer.received) == (True, True)


def test_a_handler_of_the_programs_own_is_called_and_may_let_all_go_on() -> None:
    calls = list[int]()
    with handling(signal.SIGINT, lambda number, frame: calls.append(number)):
        with catching(signal.SIGINT) as outer, catching(signal.SIGINT) as inner:
            signal.raise_signal(signal.SIGINT)
        assert calls == [signal.SIGINT]
        assert (inner.received, outer.received) == (False, False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_handler_that_ends_the_program_is_remembered(error: type[BaseException]) -> None:
    def end(number: int, frame: object) -> None:
        raise error

    with handling(signal.SIGINT, end), catching(signal.SIGINT) as outer:
        with pytest.raises(error), catching(signal.SIGINT) as inner:
            signal.raise_signal(signal.SIGINT)
        assert (inner.received, outer.received) == (True, True)


@contextmanager
def handling(number: signal.Signals, handler: Callable[[int, Any], Any]) -> Iterator[None]:
    before = signal.signal(number, handler)
    yield
    signal.signal(number, before)


def test_what_is_handled_outside_python_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: pytest.fail("it can't be put back"))
    with catching(signal.SIGINT, signal.SIGTERM) as signals:
        pass
    assert not signals.received


def test_in_another_thread_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    during: list[object] = []

    def in_thread() -> None:
        with catching(signal.SIGTERM) as signals:
            during.extend([signal.getsignal(signal.SIGTERM), signals.received])

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join(SECONDS)
    assert during == [before, False]


def test_terminated_ends_a_program_that_does_not_catch_it() -> None:
    assert issubclass(Terminated, SystemExit)
    assert not issubclass(Terminated, Exception)


def test_a_forked_process_is_ended_by_sigterm_as_any_other() -> None:
    with catching(signal.SIGTERM):
        child = os.fork()
        if not child:
            try:
                send(signal.SIGTERM)
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
