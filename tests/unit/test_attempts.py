from __future__ import annotations

import pytest

from djdist._job import Failure, Job, Policy
from djdist.driver.attempts import (
    LONGEST_DEFERRAL_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MAX_DEFERRALS,
    MAX_LOST_CONNECTIONS,
    MAX_OBSTACLES,
    Attempts,
    Obstacles,
)
from lab.scripted import Clock

JOB, OTHER = Job("Square", {"n": 1}), Job("Square", {"n": 2})
OS_FAILURE = Failure("TimeoutError: no disk", kinds=("TimeoutError", "OSError", "Exception"))


def test_a_lost_key_is_tried_again_at_once_until_it_has_lost_enough_workers() -> None:
    attempts = Attempts(Policy(max_worker_losses=3))
    assert [attempts.after_loss(JOB) for _ in range(3)] == [0.0, 0.0, None]
    assert attempts.after_loss(OTHER) == 0.0


def test_a_wave_of_obstacles_counts_once_and_pauses_get_longer() -> None:
    clock = Clock()
    obstacles = Obstacles(clock)
    pauses = []
    for _ in range(MAX_OBSTACLES + 1):
        assert not obstacles.hopeless
        assert [obstacles.meet("no disk") for _ in range(100)] == [True] + [False] * 99
        pauses.append(obstacles.pause_seconds)
        clock.seconds += pauses[-1]
    assert obstacles.hopeless
    assert (obstacles.pause_seconds, obstacles.last) == (0, "no disk")
    assert pauses[0] <= 0.1
    assert 15 <= max(pauses) <= 30


def test_a_key_that_is_begun_shows_that_there_is_a_way() -> None:
    clock = Clock()
    obstacles = Obstacles(clock)
    for _ in range(3 * MAX_OBSTACLES):
        obstacles.meet("no disk")
        clock.seconds += obstacles.pause_seconds
        obstacles.forget()
    assert not obstacles.hopeless


def test_a_key_that_loses_its_connection_again_and_again_has_fewer_tries() -> None:
    attempts = Attempts(Policy())
    for _ in range(MAX_LOST_CONNECTIONS):
        assert attempts.after_deferral(JOB, begun=True, hopeless=True) is not None
    assert attempts.after_deferral(JOB, begun=True, hopeless=True) is None


def test_a_lock_is_waited_for_however_long_somebody_holds_it() -> None:
    attempts = Attempts(Policy())
    waits = [attempts.after_deferral(JOB, begun=True, blocked=True) for _ in range(100 * MAX_DEFERRALS)]
    assert None not in waits


def test_deferrals_get_longer_up_to_a_limit_and_end() -> None:
    attempts = Attempts(Policy())
    pauses = [attempts.after_deferral(JOB, begun=True) for _ in range(MAX_DEFERRALS)]
    assert pauses[0] is not None
    assert pauses[0] <= 0.1
    assert max(pause or 0 for pause in pauses) <= LONGEST_DEFERRAL_SECONDS
    assert attempts.after_deferral(JOB, begun=True) is None


def test_failures_are_not_tried_again_unless_asked() -> None:
    assert Attempts(Policy()).after_failure(JOB, OS_FAILURE) is None


def test_retries_double_their_pause_with_jitter_up_to_a_limit() -> None:
    attempts = Attempts(Policy(retries=20))
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
    attempts = Attempts(Policy(retries=1, retry_on=retry_on))
    assert (attempts.after_failure(JOB, OS_FAILURE) is not None) == again
