from __future__ import annotations

from types import ModuleType
from typing import Any

import datajoint as dj
import numpy as np
import pytest

import lab as pipelines
from lab.watching import meanwhile, wait_until
from servers import Server

NAPPING = {"make_kwargs": {"seconds": 0.01}}


@pytest.fixture(params=["local", "ray"])
def one_place(request: pytest.FixtureRequest) -> Any:
    """An executor that makes one key at a time, in this process and on a cluster."""
    if request.param == "local":
        return "local"
    import djdist

    request.getfixturevalue("ray_cluster")
    return djdist.RayExecutor(num_cpus=2)


def order_made(lab: ModuleType) -> list[int]:
    """List the sessions' numbers in the order in which their keys were made."""
    made = lab.Logged() * lab.Session()
    return [int(n) for n in made.to_arrays("n", order_by="monotonic_ns")]


def prioritise(lab: ModuleType, priorities: dict[int, int]) -> None:
    for n, priority in priorities.items():
        key = (lab.Session & {"n": n}).keys()[0]
        lab.Logged.jobs.update1({**key, "priority": priority})


def test_keys_are_made_in_the_order_of_their_priority(lab: ModuleType, one_place: Any) -> None:
    pipelines.fill(lab)
    lab.Logged.jobs.refresh()
    prioritise(lab, {1: 9, 2: 3, 3: -128, 4: 127, 5: 0, 6: 4})
    lab.Logged.populate(reserve_jobs=True, executor=one_place, **NAPPING)
    assert order_made(lab) == [3, 5, 2, 6, 1, 4]


def test_a_priority_may_be_a_number_of_numpy(lab: ModuleType, one_place: Any) -> None:
    pipelines.fill(lab)
    options: dict[str, Any] = {"priority": np.int64(3), "reserve_jobs": True, "executor": one_place}
    assert lab.Logged.populate(**options)["success_count"] == 6


def test_of_one_priority_the_earlier_scheduled_is_made_first(lab: ModuleType) -> None:
    pipelines.fill(lab)
    late, early = "subject_id = 1", "subject_id = 2"
    lab.Logged.jobs.refresh(late, delay=-10)
    lab.Logged.jobs.refresh(early, delay=-100)
    lab.Logged.populate(reserve_jobs=True)
    assert sorted(order_made(lab)[:3]) == [4, 5, 6]


def test_an_urgent_key_that_comes_later_overtakes_those_that_wait(lab: ModuleType) -> None:
    pipelines.fill(lab)
    urgent = (lab.Session & "n = 6").keys()[0]
    lab.Logged.jobs.refresh(lab.Session & "n < 6")
    lab.Logged.populate(reserve_jobs=True, max_calls=2, refresh=False)
    lab.Logged.jobs.refresh(urgent, priority=0)
    lab.Logged.populate(reserve_jobs=True, refresh=False)
    assert order_made(lab)[2] == 6


@pytest.mark.long_on("ray")
def test_an_urgent_key_that_comes_while_10000_wait_overtakes_all_that_are_not_in_flight(
    lab: ModuleType, one_place: Any, server: Server
) -> None:
    pipelines.fill(lab, subjects=1, sessions=10_001)
    (urgent,) = (lab.Session & "n = 10001").keys()
    lab.Logged.jobs.refresh(lab.Session & "n <= 10000")
    made, jobs = lab.Logged().full_table_name, lab.Logged.jobs.full_table_name
    waiting: set[int] = set()

    def insert() -> None:
        with server.connect() as connection:
            wait_until(lambda: connection.query(f"SELECT 1 FROM {made} LIMIT 1").fetchone(), "the first key")
            connection.query(
                f"INSERT INTO {jobs} (subject_id, session_date, status, priority, scheduled_time) "
                "VALUES (%s, %s, 'pending', 0, CURRENT_TIMESTAMP(3) - INTERVAL '1' SECOND)",
                args=tuple(urgent.values()),
            )
            # the lock waits for a reservation that is under way
            pending = f"SELECT session_date FROM {jobs} WHERE status = 'pending' FOR UPDATE"
            waiting.update((date - pipelines.FIRST_DATE).days + 1 for (date,) in connection.query(pending))

    with meanwhile(insert):
        lab.Logged.populate(reserve_jobs=True, refresh=False, executor=one_place, max_calls=200, **NAPPING)
    order = order_made(lab)
    assert len(waiting) > 9_000
    assert waiting & set(order[: order.index(10_001)]) == set()
    assert waiting & set(order) - {10_001}


def test_only_jobs_of_a_priority_or_a_more_urgent_one(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    lab.Logged.jobs.refresh()
    prioritise(lab, {1: 1, 2: 2, 3: 3})
    options = {"reserve_jobs": True, "refresh": False, "executor": executor}
    assert lab.Logged.populate(priority=2, **options)["success_count"] == 2
    assert set(order_made(lab)) == {1, 2}


def test_new_jobs_get_the_priority_of_the_call_or_of_the_settings(lab: ModuleType) -> None:
    pipelines.fill(lab)
    with dj.config.override(jobs__default_priority=8):
        lab.Logged.jobs.refresh("subject_id = 1")
        lab.Logged.jobs.refresh("subject_id = 2", priority=2)
    assert sorted(lab.Logged.jobs.to_arrays("priority")) == [2, 2, 2, 8, 8, 8]


def test_delayed_jobs_wait_until_they_are_due(lab: ModuleType) -> None:
    pipelines.fill(lab)
    lab.Logged.jobs.refresh("subject_id = 1", delay=3600)
    assert lab.Logged.populate(reserve_jobs=True)["success_count"] == 3
    assert len(lab.Logged.jobs.pending) == 3


def test_restrictions_narrow_what_is_refreshed_and_what_is_reserved(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    lab.Logged.populate("subject_id = 1", reserve_jobs=True, executor=executor, max_calls=1)
    assert len(lab.Logged.jobs.pending) == 2
    lab.Logged.jobs.refresh()
    lab.Logged.populate({"subject_id": 1}, reserve_jobs=True, executor=executor)
    assert set(lab.Logged().to_arrays("subject_id")) == {1}
    assert len(lab.Logged.jobs.pending) == 3


def test_without_refresh_only_known_jobs_are_made(lab: ModuleType) -> None:
    pipelines.fill(lab)
    assert lab.Logged.populate(reserve_jobs=True, refresh=False)["success_count"] == 0
    with dj.config.override(jobs__auto_refresh=False):
        assert lab.Logged.populate(reserve_jobs=True)["success_count"] == 0
        assert lab.Logged.populate(reserve_jobs=True, refresh=True)["success_count"] == 6
