from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from lab import doing

COUNTS = ["pending", "reserved", "success", "error", "ignore"]


def counts(table: Any) -> dict[str, int]:
    return {status: count for status, count in table.jobs.progress().items() if count and status != "total"}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


def test_errors_are_collected_recorded_and_retried_after_the_fix(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab, subjects=4, sessions=3)
    options = {"reserve_jobs": True, "suppress_errors": True, "executor": executor}
    summary = lab.Fragile.populate(**options)
    assert summary["success_count"] == 10
    assert sorted(message for _, message in summary["error_list"]) == [
        "ValueError: bad n 10",
        "ValueError: bad n 5",
    ]
    errors = lab.Fragile.jobs.errors
    assert sorted(e["error_message"] for e in errors.to_dicts()) == [
        "ValueError: bad n 10",
        "ValueError: bad n 5",
    ]
    assert all("in make\n" in stack for stack in errors.to_arrays("error_stack"))
    assert all(pid > 0 for pid in errors.to_pandas()["pid"])
    assert lab.Fragile.populate(**options) == {"success_count": 0, "error_list": []}
    lab.Fix.insert(errors.keys())
    errors.delete()
    assert lab.Fragile.populate(**options) == {"success_count": 2, "error_list": []}
    assert counts(lab.Fragile) == {}


def test_the_first_error_is_raised_as_itself_and_the_rest_is_given_back(
    lab: ModuleType, executor: Any
) -> None:
    pipelines.fill(lab, subjects=4, sessions=3)
    with pytest.raises(ValueError, match=r"bad n (5|10)") as raised:  # whichever comes first
        lab.Fragile.populate(reserve_jobs=True, executor=executor)
    left = counts(lab.Fragile)
    assert left["error"] in (1, 2)  # the other bad one may run by then, and what runs is finished
    assert "reserved" not in left
    assert len(lab.Fragile()) + left["pending"] + left["error"] == 12
    if executor != "local":
        assert "bad n {n}" in str(raised.value.__cause__)


def test_errors_as_exceptions(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    summary = lab.Fragile.populate(suppress_errors=True, return_exception_objects=True, executor=executor)
    ((key, error),) = summary["error_list"]
    assert (lab.Session & key).fetch1("n") == 5
    assert isinstance(error, ValueError)
    assert str(error) == "bad n 5"


class Array:
    """Stands for what takes much memory."""


@pytest.mark.parametrize("as_objects", [False, True])
def test_what_a_make_held_that_failed_is_let_go_of(lab: ModuleType, as_objects: bool) -> None:
    def fail(table: Any, key: dict[str, Any], n: int) -> None:
        array = Array()
        arrays.append(weakref.ref(array))
        try:
            raise KeyError(n)
        except KeyError as error:
            raise ValueError("no") from error

    arrays: list[weakref.ref[Array]] = []
    pipelines.fill(lab)
    gc.disable()
    try:
        summary = lab.Scripted.populate(
            suppress_errors=True, return_exception_objects=as_objects, make_kwargs={"do": fail}
        )
        assert [array for array in arrays if array()] == []
    finally:
        gc.enable()
    assert len(summary["error_list"]) == len(arrays) == 6
    if as_objects:
        (_, error), *_ = summary["error_list"]
        assert [type(e) for e in (error, error.__cause__)] == [ValueError, KeyError]
        assert "in fail" in "".join(traceback.format_exception(error))


def test_the_error_that_is_raised_has_its_frames_for_a_debugger(lab: ModuleType) -> None:
    def fail(table: Any, key: dict[str, Any], n: int) -> None:
        raise ValueError(n)

    pipelines.fill(lab)
    with pytest.raises(ValueError, match="1") as raised:
        lab.Scripted.populate(make_kwargs={"do": fail})
    assert raised.traceback[-1].frame.f_locals["n"] == 1


def test_ignored_jobs_are_left_alone(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    ignored = lab.Square.key_source.keys(limit=1)[0]
    lab.Square.jobs.ignore(ignored)
    assert lab.Square.populate(reserve_jobs=True, executor=executor)["success_count"] == 5
    assert lab.Square.jobs.ignored.keys() == [ignored]


def test_a_job_that_was_taken_over_changes_nothing(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    summary = lab.Stolen.populate(reserve_jobs=True, executor=executor, suppress_errors=True, max_calls=3)
    assert summary == {"success_count": 0, "error_list": []}
    assert len(lab.Stolen()) == 0
    taken = lab.Stolen.jobs & "connection_id = 1"
    assert set(taken.to_arrays("status")) == {"reserved"}


def test_a_killed_worker_costs_no_key(lab: ModuleType, remote_executor: Any) -> None:
    pipelines.fill(lab)
    summary = lab.Deadly.populate(reserve_jobs=True, executor=remote_executor, suppress_errors=True)
    assert summary["error_list"] == []
    assert len(lab.Deadly()) == 6
    assert counts(lab.Deadly) == {}
    on_dask = type(remote_executor).__module__.startswith("distributed")
    if not on_dask:  # where the worker may have held the driver, and its last counts
        assert summary["success_count"] == 6


def test_exceptions_that_do_not_pickle_arrive_as_text(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab, subjects=1, sessions=1)
    with pytest.raises(Exception, match="has a lock") as raised:
        lab.Unpicklable.populate(reserve_jobs=True, executor=executor)
    own = type(raised.value).__name__ == "LockedError"
    assert own if executor == "local" else isinstance(raised.value, djdist.MakeError)
    assert counts(lab.Unpicklable) == {"error": 1}


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.long_on("2-2")
def test_a_signal_leaves_nothing_reserved_and_no_error(
    lab: ModuleType, script: Callable[..., Any], number: signal.Signals, processes: str
) -> None:
    pipelines.fill(lab)
    process = script(
        f"""
import sys, {lab.__name__} as lab
options = {{"reserve_jobs": True, "make_kwargs": {{"seconds": 600}}}}
lab.Logged.populate(processes=int(sys.argv[1]), suppress_errors=True, **options)
""",
        processes,
        DJDIST_GRACE_SECONDS="1",
    )
    wait_for(lambda: len(lab.Logged.jobs.reserved & "pid > 0"), "a job that has begun")
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert counts(lab.Logged) == {"pending": 6}, error
    assert len(lab.Logged()) == 0


class TestHandlersOfTheProgram:
    """A signal that make() itself sends, so that it comes while the key is made."""

    @pytest.fixture
    def handle(self) -> Iterator[Callable[..., Any]]:
        before = signal.getsignal(signal.SIGINT)
        yield lambda handler: signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGINT, before)

    def test_one_that_goes_on_lets_the_run_go_on(self, lab: ModuleType, handle: Callable[..., Any]) -> None:
        pipelines.fill(lab)
        calls = list[int]()
        handle(lambda number, frame: calls.append(number))
        summary = lab.Scripted.populate(reserve_jobs=True, make_kwargs={"do": doing.interrupt_itself})
        assert summary == {"success_count": 6, "error_list": []}
        assert calls == [signal.SIGINT] * 6

    def test_one_that_exits_ends_the_run_and_is_no_error_of_the_key(
        self, lab: ModuleType, handle: Callable[..., Any]
    ) -> None:
        pipelines.fill(lab)
        handle(lambda number, frame: sys.exit(3))
        with pytest.raises(SystemExit, match="3"):
            lab.Scripted.populate(reserve_jobs=True, make_kwargs={"do": doing.interrupt_itself})
        assert counts(lab.Scripted) == {"pending": 6}
