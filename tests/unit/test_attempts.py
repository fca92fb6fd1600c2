from __future__ import annotations

import random

import pytest

from djdist.attempts import (
    FIRST_PAUSE_SECONDS,
    LONGEST_DEFERRAL_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MAX_DEFERRALS,
    MAX_SPARES,
    Attempts,
)
from djdist.job import Failure, Job, Policy

JOB, OTHER = Job({"n": 1}), Job({"n": 2})
OS_FAILURE = Failure("TimeoutError: no disk", kinds=("TimeoutError", "OSError", "Exception"))


def test_a_lost_key_is_tried_again_at_once_until_it_has_lost_enough_workers() -> None:
    attempts = Attempts(Policy(max_losses=3))
    assert [attempts.after_loss(JOB) for _ in range(3)] == [0.0, 0.0, None]
    assert attempts.after_loss(OTHER) == 0.0


def test_losses_before_a_key_began_cost_nothing_but_not_for_ever() -> None:
    attempts = Attempts(Policy())
    assert [attempts.may_be_spared(JOB) for _ in range(MAX_SPARES + 1)] == [True] * MAX_SPARES + [False]


def test_deferrals_get_longer_up_to_a_limit_and_end() -> None:
    attempts = Attempts(Policy(), random.Random(1))
    pauses = [attempts.after_deferral(JOB, begun=True) for _ in range(MAX_DEFERRALS)]
    assert pauses[0] is not None
    assert pauses[0] <= 0.1
    assert max(pause or 0 for pause in pauses) <= LONGEST_DEFERRAL_SECONDS
    assert attempts.after_deferral(JOB, begun=True) is None


def test_failures_are_not_tried_again_unless_asked() -> None:
    assert Attempts(Policy()).after_failure(JOB, OS_FAILURE) is None


def test_retries_double_their_pause_with_jitter_up_to_a_limit() -> None:
    attempts = Attempts(Policy(retries=20), random.Random(1))
    for tries in range(20):
        pause = attempts.after_failure(JOB, OS_FAILURE)
        longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**tries)
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
