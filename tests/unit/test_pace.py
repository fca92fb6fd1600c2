from __future__ import annotations

from djdist._job import SHARED_SECONDS
from djdist.worker.pace import FIRST, SINGLE_SECONDS, Pace
from lab.scripted import Clock


def test_it_grows_up_to_the_most() -> None:
    pace, sizes = Pace(50), []
    for _ in range(5):
        sizes.append(pace.size)
        pace.made(pace.size, 0.001)
    assert sizes == [FIRST, 2 * FIRST, 4 * FIRST, 50, 50]


def test_it_takes_no_more_keys_than_fit() -> None:
    pace = Pace(128)
    pace.made(8, SHARED_SECONDS)
    assert pace.size == 8
    pace.made(1, 10 * SHARED_SECONDS)
    assert pace.size == 1
    assert pace.shares
    pace.made(1, SHARED_SECONDS / 100)
    assert pace.size == 2


def test_it_begins_again_with_few() -> None:
    pace = Pace(128)
    pace.made(8, 0.0)
    pace.undone()
    assert pace.size == FIRST


def test_after_a_conflict_keys_do_not_share_for_a_while() -> None:
    clock = Clock()
    pace = Pace(128, clock)
    pace.in_conflict("a deadlock")
    assert not pace.shares
    clock.seconds = SINGLE_SECONDS
    assert pace.shares


def test_at_its_end_keys_share_no_more() -> None:
    pace = Pace(128)
    pace.end()
    pace.undone()
    assert (pace.shares, pace.size) == (False, 1)


def test_one_key_is_nothing_to_share() -> None:
    assert not Pace().shares
