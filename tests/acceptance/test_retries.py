"""Errors that are tried again: by the call itself, and on request."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import djdist
import lab as pipelines
from lab import doing
from lab.watching import counts


def test_what_fails_at_first_is_made_in_the_same_call(lab: ModuleType, executor: Any, tmp_path: Path) -> None:
    pipelines.fill(lab, subjects=1, sessions=3)
    arguments = {"do": doing.fail_the_first_time, "folder": str(tmp_path)}
    options = {"reserve_jobs": True, "executor": executor, "make_kwargs": arguments}
    assert lab.Scripted.populate(retries=1, **options) == {"success_count": 3, "error_list": []}
    assert doing.begun(tmp_path) == [1, 1, 2, 2, 3, 3]
    assert counts(lab.Scripted) == {}


def test_only_the_named_errors_are_worth_another_try(lab: ModuleType, tmp_path: Path) -> None:
    pipelines.fill(lab, subjects=1, sessions=1)
    arguments = {"do": doing.fail_the_first_time, "folder": str(tmp_path)}
    options = {"reserve_jobs": True, "make_kwargs": arguments, "retries": 5}
    with pytest.raises(ConnectionRefusedError):
        lab.Scripted.populate(retry_on=[ValueError, "KeyError"], **options)
    assert doing.begun(tmp_path) == [1]
    assert lab.Scripted.jobs.retry() == 1
    (tmp_path / next(iter(tmp_path.iterdir())).name).unlink()
    assert lab.Scripted.populate(retry_on=[OSError], **options)["success_count"] == 1


def test_retries_may_come_from_the_settings(
    lab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(djdist.config, "retries", 1)
    monkeypatch.setattr(djdist.config, "retry_on", ("OSError",))
    pipelines.fill(lab, subjects=1, sessions=1)
    arguments = {"do": doing.fail_the_first_time, "folder": str(tmp_path)}
    assert lab.Scripted.populate(make_kwargs=arguments)["success_count"] == 1


@pytest.mark.parametrize("option", [{"retries": -1}, {"retries": 1.5}, {"timeout_seconds": 0}])
def test_bad_limits_are_clear_errors(lab: ModuleType, option: dict[str, Any]) -> None:
    with pytest.raises(djdist.OptionError, match=next(iter(option))):
        lab.Square.populate(**option)


class TestOnRequest:
    @pytest.fixture(autouse=True)
    def failed(self, lab: ModuleType) -> None:
        pipelines.fill(lab, subjects=2, sessions=5)
        lab.Fragile.jobs.refresh(priority=3)
        lab.Fragile.populate(reserve_jobs=True, suppress_errors=True)
        assert counts(lab.Fragile) == {"error": 2}

    def test_all_errors_go_back_to_pending_with_their_priority(self, lab: ModuleType) -> None:
        before = lab.Fragile.jobs.errors.to_dicts()
        assert lab.Fragile.jobs.retry() == 2
        jobs = lab.Fragile.jobs.pending.to_dicts()
        assert [job["priority"] for job in jobs] == [3, 3]
        assert all(job["error_message"] == "" and job["error_stack"] is None for job in jobs)
        assert all(job["pid"] == 0 and job["completed_time"] is None for job in jobs)
        assert [job["subject_id"] for job in jobs] == [job["subject_id"] for job in before]
        lab.Fragile.populate(reserve_jobs=True, suppress_errors=True)
        assert counts(lab.Fragile) == {"error": 2}

    @pytest.mark.parametrize(
        "restriction",
        [
            {"subject_id": 1},
            "error_message LIKE '%bad n 5%'",
            "error_message NOT LIKE '%:%0'",
            [{"subject_id": 1}],
        ],
    )
    def test_some_errors_go_back(self, lab: ModuleType, restriction: Any) -> None:
        assert lab.Fragile.jobs.retry(restriction) == 1
        assert lab.Fragile.jobs.pending.to_arrays("subject_id").tolist() == [1]
        assert lab.Fragile.jobs.errors.to_arrays("subject_id").tolist() == [2]

    def test_several_restrictions_narrow_further(self, lab: ModuleType) -> None:
        assert lab.Fragile.jobs.retry("subject_id = 1", "error_message LIKE '%10'") == 0
        assert counts(lab.Fragile) == {"error": 2}

    def test_errors_that_are_none_are_left_alone(self, lab: ModuleType) -> None:
        lab.Fragile.jobs.delete_quick()
        lab.Fragile.jobs.ignore({"subject_id": 1, "session_date": pipelines.FIRST_DATE})
        assert lab.Fragile.jobs.retry() == 0
        assert counts(lab.Fragile) == {"ignore": 1}


def test_there_is_nothing_to_retry_before_the_first_refresh(lab: ModuleType) -> None:
    assert isinstance(lab.Square.jobs, dj.Job)
    assert lab.Square.jobs.retry() == 0
