from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest

import djdist
from djdist._job import Failure, Job, RunInfo, Status, Summary

NOW = datetime.now(timezone.utc)
INFO = RunInfo("1a2b", "Square", "lab", "ada", "laptop", 7, NOW, detached=True, suppress_errors=True)


def run_with(result: Summary | None, status: Status) -> djdist.Run:
    """Give the handle of a run whose driver answers so."""
    answers: dict[str, Any] = {"result": result, "status": status, "forget": None}
    return djdist.Run(INFO, answers.__getitem__)


def test_the_handle_of_a_run_that_has_not_begun_says_so() -> None:
    assert repr(run_with(None, Status())).endswith(": starting>")


def test_who_waits_no_time_for_a_run_that_is_over_gets_its_result() -> None:
    run = run_with(Summary(3), Status(made=3))
    assert run.wait(timeout_seconds=0) == {"success_count": 3, "error_list": []}


def test_a_handle_knows_how_many_failed_beyond_those_listed() -> None:
    run = run_with(Summary(3, errors=((Job("Square", {"n": 1}), Failure("bad")),), failed=2000), Status())
    assert run.failed is None
    assert run.wait() == {"success_count": 3, "error_list": [({"n": 1}, "bad")]}
    assert run.failed == 2000


def test_who_waits_no_time_for_a_run_that_goes_on_is_told_so() -> None:
    with pytest.raises(TimeoutError, match="goes on after 0 seconds"):
        run_with(None, Status(made=3)).wait(timeout_seconds=0)
