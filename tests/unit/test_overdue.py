from __future__ import annotations

from djdist._job import Job
from djdist.driver.overdue import CHECKS, Overdue
from lab.scripted import Clock

IN_FLIGHT = {1: Job("Square", {"n": 1}), 2: Job("Square", {"n": 2})}


def test_time_counts_from_when_a_job_was_first_seen_to_have_begun() -> None:
    clock = Clock()
    overdue = Overdue(10, clock, sees_beginnings=True)
    clock.seconds = 100
    assert overdue.among({1: IN_FLIGHT[1]}) == []
    clock.seconds = 105
    assert overdue.among(IN_FLIGHT) == []
    clock.seconds = 110
    assert overdue.among(IN_FLIGHT) == [1]


def test_a_key_that_begins_again_has_all_its_time_again() -> None:
    clock = Clock()
    overdue = Overdue(10, clock, sees_beginnings=True)
    overdue.among({1: IN_FLIGHT[1]})
    clock.seconds = 10
    assert overdue.among({7: IN_FLIGHT[1]}) == []


def test_each_key_of_a_task_has_its_own_time() -> None:
    clock = Clock()
    overdue = Overdue(10, clock, sees_beginnings=True)
    for clock.seconds, job in ((0, IN_FLIGHT[1]), (8, IN_FLIGHT[2]), (17, IN_FLIGHT[2])):
        assert overdue.among({1: job}) == []
    clock.seconds = 18
    assert overdue.among({1: IN_FLIGHT[2]}) == [1]


def test_it_asks_ten_times_within_the_timeout() -> None:
    clock = Clock()
    overdue = Overdue(10, clock, sees_beginnings=True)
    assert not overdue.asks()
    clock.seconds = 10 / CHECKS
    assert overdue.asks()


def test_without_a_timeout_nothing_is_overdue_and_it_never_asks() -> None:
    clock = Clock()
    overdue = Overdue(None, clock, sees_beginnings=False)
    overdue.note(1)
    clock.seconds = 1e9
    assert not overdue.asks()
    assert not overdue.explains(1)


def test_a_death_is_explained_by_the_time_since_the_beginning_where_that_is_seen() -> None:
    clock = Clock()
    for sees_beginnings, explained in ((True, False), (False, True)):
        clock.seconds = 0
        overdue = Overdue(10, clock, sees_beginnings=sees_beginnings)
        overdue.note(1)
        clock.seconds = 9
        overdue.among({1: IN_FLIGHT[1]})
        clock.seconds = 12
        assert overdue.explains(1) is explained
        clock.seconds = 19
        assert overdue.explains(1)
