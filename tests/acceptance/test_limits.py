"""make() calls that never end, and such that misbehave: the run goes on, and the next key starts clean."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from djdist._executor import default_slots
from lab import doing
from lab.watching import counts


class TestTimeout:
    @pytest.mark.long_on("dask")
    @pytest.mark.long_on("ray")
    @pytest.mark.parametrize(
        "do", [doing.never_end_at_the_first, doing.hold_the_interpreter_at_the_first], ids=["sleeps", "holds"]
    )
    @pytest.mark.long_on("holds")
    def test_it_is_ended_and_becomes_an_error_and_the_rest_is_made(
        self, lab: ModuleType, remote_executor: Any, tmp_path: Path, do: Any
    ) -> None:
        on_dask = type(remote_executor).__module__.startswith("distributed")
        if on_dask and do is doing.hold_the_interpreter_at_the_first:
            pytest.skip("where a Dask worker's interpreter hangs, its driver's hangs, too")
        pipelines.fill(lab)
        summary = lab.Scripted.populate(
            reserve_jobs=True,
            suppress_errors=True,
            executor=remote_executor,
            timeout_seconds=1.5,
            make_kwargs={"do": do, "folder": str(tmp_path)},
        )
        assert counts(lab.Scripted) == {"error": 1}
        (job,) = lab.Scripted.jobs.errors.to_dicts()
        assert job["error_message"] == "TimeoutError: timed out after 1.5 seconds"
        assert (lab.Session & job).fetch1("n") == 1
        assert len(lab.Scripted()) == 5
        if (
            not on_dask
        ):  # where the driver may have been ended with its neighbour, and its last counts with it
            assert (summary["success_count"], len(summary["error_list"])) == (5, 1)
        assert doing.begun(tmp_path).count(1) == 1

    @pytest.mark.long
    def test_a_call_in_the_callers_process_gets_one_that_can_be_ended(
        self, lab: ModuleType, tmp_path: Path
    ) -> None:
        pipelines.fill(lab, subjects=1, sessions=2)
        arguments = {"do": doing.never_end_at_the_first, "folder": str(tmp_path)}
        summary = lab.Scripted.populate(suppress_errors=True, timeout_seconds=1, make_kwargs=arguments)
        assert summary["success_count"] == 1
        ((_, message),) = summary["error_list"]
        assert message == "TimeoutError: timed out after 1 seconds"

    @pytest.mark.long
    def test_it_is_raised_where_errors_are_not_suppressed(self, lab: ModuleType, tmp_path: Path) -> None:
        pipelines.fill(lab, subjects=1, sessions=1)
        arguments = {"do": doing.never_end_at_the_first, "folder": str(tmp_path)}
        with pytest.raises(TimeoutError, match="timed out after 1 seconds"):
            lab.Scripted.populate(timeout_seconds=1, make_kwargs=arguments)

    @pytest.mark.long
    def test_it_may_be_the_tables_or_the_settings_own(
        self, lab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipelines.fill(lab, subjects=1, sessions=1)
        arguments = {"do": doing.never_end_at_the_first, "folder": str(tmp_path)}
        monkeypatch.setattr(djdist.config, "timeout_seconds", 1.0)
        with pytest.raises(TimeoutError, match="1 seconds"):
            lab.Scripted.populate(make_kwargs=arguments)
        monkeypatch.setattr(lab.Scripted, "timeout_seconds", 0.5, raising=False)
        with pytest.raises(TimeoutError, match=r"0\.5 seconds"):
            lab.Scripted.populate(make_kwargs=arguments)


def misbehave(lab: ModuleType, executor: Any, do: Any) -> dict[str, Any]:
    pipelines.fill(lab, subjects=1, sessions=3)
    options = {"reserve_jobs": True, "suppress_errors": True, "make_kwargs": {"do": do}}
    summary: dict[str, Any] = lab.Scripted.populate(executor=executor, **options)
    return summary


def test_a_long_message_is_shortened_and_read(lab: ModuleType, executor: Any) -> None:
    summary = misbehave(lab, executor, doing.raise_a_long_message)
    assert [message[:16] for _, message in summary["error_list"]] == ["ValueError: long"] * 3
    assert all(len(message) < 200_000 for _, message in summary["error_list"])
    assert counts(lab.Scripted) == {"error": 3}
    assert all(job["error_message"].startswith("ValueError") for job in lab.Scripted.jobs.errors.to_dicts())


@pytest.mark.long_on("ray")
@pytest.mark.long_on("dask")
@pytest.mark.parametrize(
    "do", [doing.print_without_end, doing.fork_by_hand, doing.use_processes, doing.spawn_processes]
)
def test_what_prints_or_starts_processes_is_made(lab: ModuleType, remote_executor: Any, do: Any) -> None:
    assert misbehave(lab, remote_executor, do) == {"success_count": 3, "error_list": []}
    assert counts(lab.Scripted) == {}


def test_a_closed_connection_fails_only_the_key_that_closed_it(lab: ModuleType, executor: Any) -> None:
    summary = misbehave(lab, executor, doing.close_the_connection)
    assert summary["success_count"] == 2
    ((_, message),) = summary["error_list"]
    assert "make() closed the connection" in message
    assert counts(lab.Scripted) == {"error": 1}
    assert len(lab.Scripted()) == 2


def test_a_lock_that_was_left_behind_does_not_meet_the_next_key(
    lab: ModuleType, remote_executor: Any
) -> None:
    summary = misbehave(lab, remote_executor, doing.leave_a_lock_and_a_transaction)
    assert summary["success_count"] == 2
    assert [message for _, message in summary["error_list"]] == ["ValueError: the lock stays"]
    assert len(lab.Scripted()) == 2


def test_the_list_of_errors_is_bounded_and_the_jobs_table_has_all(
    lab: ModuleType, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(djdist.config, "max_errors_listed", 2)
    pipelines.fill(lab, subjects=2, sessions=3)
    options = {"reserve_jobs": True, "suppress_errors": True, "executor": executor}
    summary = lab.Scripted.populate(make_kwargs={"do": doing.raise_error_of_the_pipeline}, **options)
    assert len(summary["error_list"]) == 2
    assert counts(lab.Scripted) == {"error": 6}


class TestThreadsOfLibraries:
    """As many threads in as many processes as there are processors would stand in each other's way."""

    def test_processes_share_the_processors_out(
        self, lab: ModuleType, remote_executor: Any, tmp_path: Path
    ) -> None:
        noted = noted_limits(lab, tmp_path, executor=remote_executor)
        local = isinstance(remote_executor, djdist.LocalExecutor)
        share = max(1, default_slots() // 2) if local else 1  # Ray and Dask see to it themselves
        assert {limits.split()[0] for limits in noted} == {str(share)}

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            pytest.param({"OMP_NUM_THREADS": "3"}, "3 3", marks=pytest.mark.long),
            ({"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "5"}, "3 5"),
        ],
        ids=["of all", "of one more"],
    )
    def test_what_the_user_has_said_holds(
        self,
        lab: ModuleType,
        said: dict[str, str],
        expected: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)  # a Dask cluster in this process sets it
        for name, value in said.items():
            monkeypatch.setenv(name, value)
        assert set(noted_limits(lab, tmp_path, processes=2)) == {expected}


def noted_limits(lab: ModuleType, folder: Path, **options: Any) -> list[str]:
    pipelines.fill(lab)
    arguments = {"do": doing.note_limits_of_threads, "folder": str(folder)}
    lab.Scripted.populate(make_kwargs=arguments, **options)
    return [file.read_text() for file in folder.glob("limits-*")]
