from __future__ import annotations

import pytest

from djdist._backoff import backoff_seconds
from djdist.driver.shutdown import Shutdown
from lab.scripted import Clock


def test_what_runs_goes_on_until_the_grace_is_over_and_without_end_where_there_is_none() -> None:
    clock = Clock()
    for grace_seconds, is_cut in ((None, False), (5, True)):
        shutdown = Shutdown(clock)
        assert not shutdown.is_stopping
        assert shutdown.stop(grace_seconds)
        clock.seconds += 4
        assert (shutdown.is_stopping, shutdown.is_cut) == (True, False)
        clock.seconds += 1
        assert shutdown.is_cut is is_cut


def test_a_second_stop_is_not_new_and_grants_no_longer_grace() -> None:
    shutdown = Shutdown(Clock())
    assert shutdown.stop(5)
    assert not shutdown.stop(60)
    assert shutdown.seconds_left == 5
    shutdown.stop(0)
    assert shutdown.is_cut


def test_patience_with_a_database_says_nothing_about_what_runs() -> None:
    clock = Clock()
    shutdown = Shutdown(clock)
    shutdown.end_patience(10)
    for clock.seconds, is_patient in ((0, True), (10, False)):
        assert shutdown.is_patient is is_patient
    assert (shutdown.is_stopping, shutdown.is_cut) == (False, False)


@pytest.mark.parametrize("tries", [1, 2, 5, 50, 5000])
def test_pauses_double_up_to_a_limit_and_at_least_half_of_each_is_kept(tries: int) -> None:
    longest = min(30, 0.1 * 2.0 ** min(tries - 1, 20))
    assert longest / 2 <= backoff_seconds(tries, 0.1, 30) <= longest


def test_a_run_is_forsaken_only_where_nobody_has_stopped_it() -> None:
    forsaken, stopped = Shutdown(), Shutdown()
    stopped.stop()
    assert (forsaken.forsake(), stopped.forsake()) == (True, False)
    assert (forsaken.is_forsaken, stopped.is_forsaken) == (True, False)
    assert forsaken.is_stopping
    assert not forsaken.forsake()
    assert forsaken.is_forsaken
