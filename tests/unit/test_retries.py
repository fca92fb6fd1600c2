from __future__ import annotations

from typing import Any

import pytest

from djdist._job import Failure, Job, Policy, Recipe
from djdist.driver.retries import (
    LONGEST_PAUSE_SECONDS,
    LONGEST_RETRY_SECONDS,
    MAX_LOST_CONNECTIONS,
    MAX_SETUP_ERRORS,
    MAX_TRANSIENT_ERRORS,
    CircuitBreaker,
    Retries,
)
from lab.scripted import Clock

JOB, OTHER = Job("Square", {"n": 1}), Job("Square", {"n": 2})
OS_FAILURE = Failure("TimeoutError: no disk", kinds=("TimeoutError", "OSError", "Exception"))


def retries(**options: Any) -> Retries:
    return Retries({"Square": Recipe("Square", **options)}, Policy(max_worker_losses=3))


def test_a_lost_key_is_tried_again_at_once_until_it_has_lost_enough_workers() -> None:
    attempts = retries()
    assert [attempts.after_loss(JOB) for _ in range(3)] == [0.0, 0.0, None]
    assert attempts.after_loss(OTHER) == 0.0


def test_a_wave_of_errors_counts_once_and_pauses_get_longer() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock)
    pauses = []
    for _ in range(MAX_SETUP_ERRORS + 1):
        assert not breaker.tripped
        assert [breaker.note("no disk") for _ in range(100)] == [True] + [False] * 99
        pauses.append(breaker.retry_after_seconds)
        clock.seconds += pauses[-1]
    assert breaker.tripped
    assert (breaker.retry_after_seconds, breaker.last) == (0, "no disk")
    assert pauses[0] <= 0.1
    assert 15 <= max(pauses) <= 30


def test_a_key_that_is_begun_shows_that_there_is_a_way() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock)
    for _ in range(3 * MAX_SETUP_ERRORS):
        breaker.note("no disk")
        clock.seconds += breaker.retry_after_seconds
        breaker.reset()
    assert not breaker.tripped


def test_a_key_that_loses_its_connection_again_and_again_has_fewer_tries() -> None:
    attempts = retries()
    for _ in range(MAX_LOST_CONNECTIONS):
        assert attempts.after_transient_error(JOB, begun=True, hopeless=True) is not None
    assert attempts.after_transient_error(JOB, begun=True, hopeless=True) is None


def test_a_lock_is_waited_for_however_long_somebody_holds_it() -> None:
    attempts = retries()
    waits = [
        attempts.after_transient_error(JOB, begun=True, blocked=True)
        for _ in range(100 * MAX_TRANSIENT_ERRORS)
    ]
    assert None not in waits


def test_transient_errors_get_longer_up_to_a_limit_and_end() -> None:
    attempts = retries()
    pauses = [attempts.after_transient_error(JOB, begun=True) for _ in range(MAX_TRANSIENT_ERRORS)]
    assert pauses[0] is not None
    assert pauses[0] <= 0.1
    assert max(pause or 0 for pause in pauses) <= LONGEST_RETRY_SECONDS
    assert attempts.after_transient_error(JOB, begun=True) is None


def test_failures_are_not_tried_again_unless_asked() -> None:
    assert retries().after_failure(JOB, OS_FAILURE) is None


def test_retries_double_their_pause_with_jitter_up_to_a_limit() -> None:
    attempts = retries(retries=20)
    for tries in range(20):
        pause = attempts.after_failure(JOB, OS_FAILURE)
        longest = min(LONGEST_PAUSE_SECONDS, Policy().retry_pause_seconds * 2**tries)
        assert pause is not None
        assert longest / 2 <= pause <= longest
    assert attempts.after_failure(JOB, OS_FAILURE) is None
    assert attempts.after_failure(OTHER, OS_FAILURE) is not None


@pytest.mark.parametrize(
    ("retry_on", "again"),
    [((), True), (("OSError",), True), (("ValueError", "TimeoutError"), True), (("ValueError",), False)],
)
def test_errors_worth_another_try_are_named_by_class_or_base(retry_on: tuple[str, ...], again: bool) -> None:
    attempts = retries(retries=1, retry_on=retry_on)
    assert (attempts.after_failure(JOB, OS_FAILURE) is not None) == again
