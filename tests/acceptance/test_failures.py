"""Errors of make() that are out of the ordinary, and what runs beside them."""

from __future__ import annotations

import subprocess
import threading
import traceback
from collections.abc import Callable
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


def test_what_runs_at_the_first_error_is_finished_and_the_rest_given_back(
    lab: ModuleType, remote_executor: Any, server: Server, tmp_path: Path
) -> None:
    pipelines.fill(lab)
    lab.Scripted.jobs.refresh()

    def let_the_other_finish_after_the_error() -> None:
        with server.connect() as connection:
            name = connection.adapter.make_full_table_name(lab.SCHEMA, "~~scripted")
            jobs = dj.FreeTable(connection, name)
            wait_until(lambda: len(jobs & "status = 'error'"), "the error")
        doing.open_gate(tmp_path)

    thread = threading.Thread(target=let_the_other_finish_after_the_error)
    thread.start()
    arguments = {"do": doing.raise_at_the_first_while_others_run, "folder": str(tmp_path)}
    with pytest.raises(ValueError, match="the first fails") as raised:
        lab.Scripted.populate(reserve_jobs=True, executor=remote_executor, make_kwargs=arguments)
    thread.join()
    assert "raise_at_the_first_while_others_run" in "".join(traceback.format_exception(raised.value))
    made = len(lab.Scripted())
    # on a cluster the task that waited behind the failed one may have begun before its driver knew
    assert made in (1, 2)
    assert counts(lab.Scripted) == {"error": 1, "pending": 5 - made}


@pytest.mark.parametrize("reserve_jobs", [True, False])
def test_exceptions_of_the_pipelines_own_arrive_as_themselves(
    lab: ModuleType, executor: Any, reserve_jobs: bool
) -> None:
    pipelines.fill(lab, subjects=1, sessions=2)
    with pytest.raises(lab.PipelineError) as raised:
        lab.Scripted.populate(
            reserve_jobs=reserve_jobs,
            executor=executor,
            make_kwargs={"do": doing.raise_error_of_the_pipeline},
        )
    assert raised.value.args[1] == "the pipeline's own"


def test_an_exit_from_make_is_an_error_of_that_key(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab, subjects=1, sessions=2)
    options = {"reserve_jobs": True, "executor": executor, "make_kwargs": {"do": doing.exit_python}}
    summary = lab.Scripted.populate(suppress_errors=True, **options)
    messages = sorted(message for _, message in summary["error_list"])
    assert messages == ["SystemExit: session 1 is the end", "SystemExit: session 2 is the end"]
    assert counts(lab.Scripted) == {"error": 2}


def test_errors_without_a_jobs_table_are_forgotten_with_the_call(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab, subjects=2, sessions=5)
    for _ in range(2):
        summary = lab.Fragile.populate(suppress_errors=True, executor=executor)
        assert sorted(m for _, m in summary["error_list"]) == ["ValueError: bad n 10", "ValueError: bad n 5"]
    assert len(lab.Fragile()) == 8


def test_metadata_and_version_are_written_on_request(
    connection: Any, schema_name: str, modules_folder: Path, executor: Any
) -> None:
    folder = modules_folder / schema_name
    folder.mkdir()
    git("init", "--quiet", folder=folder)
    git("commit", "--quiet", "--allow-empty", "--message", "code", folder=folder)
    with dj.config.override(jobs__add_job_metadata=True, jobs__version_method="git"):
        lab = pipelines.declare(schema_name, modules_folder)
        (modules_folder / f"{lab.__name__}.py").rename(folder / "__init__.py")
        pipelines.forget(lab)
        lab = imported(schema_name)
        pipelines.fill(lab)
        assert lab.Stats.populate(reserve_jobs=True, executor=executor)["success_count"] == 6
        names = "_job_start_time, _job_duration, _job_version"
        rows = connection.query(f"SELECT {names} FROM {lab.Stats().full_table_name}").fetchall()
    assert len(rows) == 6
    for started, duration, version in rows:
        assert (started is not None, duration > 0) == (True, True)
        assert version == git("rev-parse", "--short", "HEAD", folder=folder)
    pipelines.forget(lab)


def git(*arguments: str, folder: Path) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=lab", "-c", "user.email=lab@lab", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def imported(name: str) -> ModuleType:
    import importlib

    importlib.invalidate_caches()
    return importlib.import_module(name)


def test_a_job_that_was_deleted_while_it_was_made_inserts_nothing(
    lab: ModuleType, executor: Any, server: Any
) -> None:
    """Somebody else empties the jobs table meanwhile."""
    pipelines.fill(lab, subjects=1, sessions=3)
    summary = lab.Scripted.populate(
        reserve_jobs=True,
        suppress_errors=True,
        executor=executor,
        refresh=True,
        make_kwargs={"do": delete_own_job_from_elsewhere, "connect": server.connect},
    )
    assert summary == {"success_count": 0, "error_list": []}
    assert len(lab.Scripted()) == 0
    assert counts(lab.Scripted) == {}


def delete_own_job_from_elsewhere(
    table: Any, key: dict[str, Any], n: int, connect: Callable[[], Any]
) -> None:
    with connect() as connection:
        jobs = connection.adapter.make_full_table_name(table.database, "~~scripted")
        dj.FreeTable(connection, jobs).restrict(key).delete_quick()


def test_a_make_that_deletes_its_own_job_leaves_nothing_reserved(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab, subjects=1, sessions=1)
    summary = lab.Scripted.populate(
        reserve_jobs=True,
        suppress_errors=True,
        executor=executor,
        make_kwargs={"do": delete_own_job},
    )
    assert summary["success_count"] + len(summary["error_list"]) <= 1
    assert "reserved" not in counts(lab.Scripted)


def delete_own_job(table: Any, key: dict[str, Any], n: int) -> None:
    (table.jobs & key).delete_quick()


def test_exceptions_as_objects_for_those_that_do_not_travel(lab: ModuleType, remote_executor: Any) -> None:
    pipelines.fill(lab, subjects=1, sessions=1)
    summary = lab.Unpicklable.populate(
        suppress_errors=True, return_exception_objects=True, executor=remote_executor
    )
    ((_, error),) = summary["error_list"]
    assert isinstance(error, djdist.MakeError)
    assert "this has a lock" in str(error)
    assert "in make" in str(error.__cause__)
