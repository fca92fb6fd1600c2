"""Which jobs a call makes, where restrictions, schedules and settings say so."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import djdist
import lab as pipelines
from lab import doing
from lab.watching import counts, wait_until
from servers import Server

pytestmark = [pytest.mark.long_on("ray"), pytest.mark.long_on("dask")]


def only(lab: ModuleType, condition: str) -> Any:
    return (lab.Session & condition).proj()


def test_an_urgent_job_overtakes_those_that_wait_while_others_run(
    lab: ModuleType, remote_executor: Any, server: Server, tmp_path: Path
) -> None:
    pipelines.fill(lab, subjects=1, sessions=12)
    lab.Scripted.jobs.refresh()
    urgent = only(lab, "n = 12").fetch1("KEY")

    def make_it_urgent() -> None:
        wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
        with server.connect() as connection:
            jobs = connection.adapter.make_full_table_name(lab.SCHEMA, "~~scripted")
            connection.query(
                f"UPDATE {jobs} SET priority = 0 WHERE session_date = '{urgent['session_date']}'"
            )
        doing.open_gate(tmp_path)

    thread = threading.Thread(target=make_it_urgent)
    thread.start()
    arguments = {"do": doing.wait_at_gate_and_take_a_while, "folder": str(tmp_path)}
    lab.Scripted.populate(reserve_jobs=True, make_kwargs=arguments, executor=remote_executor)
    thread.join()
    files = sorted(tmp_path.glob("*-begun-*"), key=lambda file: int(file.name.split("-")[-1]))
    order = [int(file.name.split("-")[0]) for file in files]
    # two were being made and one more was submitted; where both end at once, two slots fill at once
    assert 12 in order[2:5]


def test_delayed_jobs_are_made_once_they_are_due(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    lab.Square.jobs.refresh(only(lab, "n <= 2"), delay=3600)
    assert lab.Square.populate(reserve_jobs=True, executor=executor)["success_count"] == 4
    assert counts(lab.Square) == {"pending": 2}
    lab.Square.jobs.delete_quick()
    lab.Square.jobs.refresh(delay=0.3)
    wait_until(lambda: lab.Square.populate(reserve_jobs=True, executor=executor)["success_count"] == 2)


def test_restrictions_may_be_queries_strings_and_keys(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    options = {"reserve_jobs": True, "executor": executor}
    assert lab.Square.populate(only(lab, "n <= 4"), "subject_id = 2", **options)["success_count"] == 1
    assert len(lab.Square.jobs) == 0
    assert lab.Square.populate({"subject_id": 7}, **options)["success_count"] == 0
    assert lab.Square.populate(only(lab, "n = 6").keys(), **options)["success_count"] == 1
    assert lab.Square.populate(dj.Not("subject_id = 1"), **options)["success_count"] == 1
    assert len(lab.Square.jobs) == 0


def test_restrictions_with_signs_that_drivers_read_otherwise(lab: ModuleType, executor: Any) -> None:
    lab.AnyKey.insert(lab.AnyKey.rows)
    first = lab.AnyKey.rows[0]
    restrictions: list[Any] = ["word LIKE '50%'", "word LIKE '%:x%'"]
    if (
        lab.schema.connection.adapter.backend == "mysql"
    ):  # DataJoint 2.3 doubles backslashes for PostgreSQL too
        restrictions.append({"word": first["word"]})
    for restriction in restrictions:
        made = lab.FromAnyKey.populate(restriction, reserve_jobs=True, executor=executor)
        assert made == {"success_count": 1, "error_list": []}
        assert lab.FromAnyKey().to_arrays("tiny").tolist() == [first["tiny"]]
        lab.FromAnyKey().delete_quick()


def test_a_restriction_and_a_priority_hold_together(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    lab.Square.jobs.refresh(only(lab, "n <= 2"), priority=9)
    lab.Square.jobs.refresh(only(lab, "n = 3"), priority=1)
    lab.Square.populate("subject_id = 1", reserve_jobs=True, priority=4, executor=executor)
    assert (lab.Square * lab.Session).to_arrays("n").tolist() == [3]
    lab.Square.populate(reserve_jobs=True, priority=4, executor=executor)
    assert (lab.Square * lab.Session).to_arrays("n").tolist() == [3, 4, 5, 6]
    assert set(lab.Square.jobs.to_arrays("priority")) == {9}


def test_completed_jobs_without_a_result_come_back_and_vanished_ones_leave(
    lab: ModuleType, executor: Any
) -> None:
    pipelines.fill(lab)
    with dj.config.override(jobs__keep_completed=True, jobs__stale_timeout=1):
        lab.Square.populate(reserve_jobs=True, executor=executor)
        (lab.Square & only(lab, "n = 2").keys()).delete_quick()
        assert lab.Square.jobs.refresh()["re_pended"] == 1
        (lab.Session & only(lab, "n in (1, 2)").keys()).delete(prompt=False)
        wait_until(lambda: lab.Square.jobs.refresh()["removed"] and len(lab.Square.jobs) == 4)
    assert counts(lab.Square) == {"success": 4}


@pytest.mark.on("processes")
def test_processes_without_an_executor_are_local_whatever_the_settings_say(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(djdist.config, "executor", "dask")
    pipelines.fill(lab, subjects=1, sessions=2)
    assert lab.Square.populate(processes=2)["success_count"] == 2
    with pytest.raises(djdist.OptionError, match="processes=2"):
        lab.Square.populate(processes=2, executor="dask")
