from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import djdist
import lab as pipelines
from lab.watching import counts

TABLES = [
    "Square", "Reading", "Stats", "Tripartite", "TripartiteGenerator",
    "Renamed", "Filtered", "Upstream", "Kwargs", "FromAnyKey",
]  # fmt: skip
TABLE_NAMES = "SELECT table_name FROM information_schema.tables WHERE table_schema = '{}'"
RESULTS = [*TABLES, "Stats.Item"]


def make_kwargs(table: str) -> dict[str, Any]:
    return {"make_kwargs": {"factor": 3}} if table == "Kwargs" else {}


def rows(lab: ModuleType, table: str) -> list[dict[str, Any]]:
    found: Any = lab
    for name in table.split("."):
        found = getattr(found, name)
    return found().to_dicts(order_by="KEY")  # type: ignore[no-any-return]


@pytest.fixture
def native(new_schema_name: Callable[[], str], connection: Any, modules_folder: Path) -> Any:
    """The same pipeline, filled and populated by plain DataJoint."""
    lab = pipelines.declare(new_schema_name(), modules_folder)
    pipelines.fill(lab)
    lab.AnyKey.insert(lab.AnyKey.rows)
    djdist.disable()
    for table in TABLES:
        getattr(lab, table).populate(**make_kwargs(table))
    djdist.enable()
    yield lab
    pipelines.forget(lab)


@pytest.mark.long_on("mysql-dask")
@pytest.mark.long_on("real-mysql")
@pytest.mark.long_on("processes")
def test_results_are_those_of_native_populate(lab: ModuleType, native: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    lab.AnyKey.insert(lab.AnyKey.rows)
    for table in TABLES:
        summary = getattr(lab, table).populate(executor=executor, reserve_jobs=True, **make_kwargs(table))
        expected = len(getattr(native, table)())
        assert summary == {"success_count": expected, "error_list": []}, table
        assert len(getattr(lab, table).jobs) == 0
    for table in RESULTS:
        assert rows(lab, table) == rows(native, table), table


def test_keys_are_made_without_a_jobs_table(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    assert lab.Stats.populate("subject_id = 1", executor=executor, max_calls=2)["success_count"] == 2
    assert lab.Stats.populate(executor=executor)["success_count"] == 4
    assert len(lab.Stats.Item()) == 18
    assert not any("~~" in name for (name,) in lab.schema.connection.query(TABLE_NAMES.format(lab.SCHEMA)))


def test_what_mysql_can_not_work_out_of_a_key_source_is_no_key_as_in_a_select(
    lab: ModuleType, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if connection.adapter.backend == "postgresql":
        pytest.skip("where a SELECT fails, too")
    pipelines.fill(lab)
    ratio = property(lambda table: lab.Session & "10 / (n - 3) > 0")
    monkeypatch.setattr(lab.Square, "key_source", ratio, raising=False)
    with dj.config.override(jobs__keep_completed=True):
        assert lab.Square.populate("n > 4", reserve_jobs=True)["success_count"] == 2
        lab.Square.delete_quick()
        lab.Square.jobs.refresh(priority=3)
        assert counts(lab.Square) == {"pending": 3}
        assert lab.Square.populate(reserve_jobs=True)["success_count"] == 3


def test_completed_jobs_are_kept_on_request(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    with dj.config.override(jobs__keep_completed=True):
        lab.Square.populate(reserve_jobs=True, executor=executor)
        assert lab.Square.populate(reserve_jobs=True, executor=executor)["success_count"] == 0
    for job in lab.Square.jobs.completed.to_dicts():
        assert job["completed_time"] >= job["reserved_time"]
        assert job["duration"] > 0
        assert job["pid"] > 0
    assert lab.Square.jobs.progress()["success"] == 6


def test_the_code_version_is_that_of_the_folder_of_the_tables_module(
    lab: ModuleType, executor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=lab", "-c", "user.email=lab@lab"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "code")
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "pipeline.py"))
    pipelines.fill(lab)
    with dj.config.override(jobs__version_method="git", jobs__keep_completed=True):
        lab.Square.populate(reserve_jobs=True, executor=executor, max_calls=2)
    versions = set(lab.Square.jobs.completed.to_arrays("version"))
    assert versions == {git("rev-parse", "--short", "HEAD")}


def test_keys_are_made_in_other_processes(lab: ModuleType, remote_executor: Any) -> None:
    import os

    pipelines.fill(lab)
    lab.Logged.populate(executor=remote_executor, reserve_jobs=True, make_kwargs={"seconds": 0.05})
    pids = set(lab.Logged().to_arrays("pid"))
    assert len(lab.Logged()) == 6
    assert os.getpid() not in pids
