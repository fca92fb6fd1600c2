"""Tiny keys that share transactions, on every executor."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import djdist
import lab as pipelines
from djdist.errors import OptionError
from lab import doing

KEYS = 60


@pytest.mark.parametrize("reserve_jobs", [True, pytest.param(False, marks=pytest.mark.long)])
def test_each_key_has_its_own_outcome(lab: ModuleType, executor: Any, reserve_jobs: bool) -> None:
    pipelines.fill(lab, subjects=1, sessions=KEYS)
    options = {"reserve_jobs": reserve_jobs, "executor": executor, "keys_per_transaction": "auto"}
    summary = lab.Fragile.populate(suppress_errors=True, **options)
    bad = range(5, KEYS + 1, 5)
    assert summary["success_count"] == KEYS - len(bad)
    assert sorted(message for _, message in summary["error_list"]) == sorted(
        f"ValueError: bad n {n}" for n in bad
    )
    assert sorted(lab.Fragile().to_arrays("result")) == [n for n in range(1, KEYS + 1) if n % 5]
    assert lab.Stats.populate(**options) == {"success_count": KEYS, "error_list": []}
    assert len(lab.Stats.Item()) == 3 * KEYS
    if reserve_jobs:
        assert len(lab.Fragile.jobs.errors) == len(lab.Fragile.jobs) == len(bad)
        assert len(lab.Stats.jobs) == 0


@pytest.mark.long_on("ray")
@pytest.mark.long_on("dask")
def test_a_key_that_kills_its_workers_is_told_from_those_in_its_transaction(
    lab: ModuleType, remote_executor: Any, tmp_path: Path
) -> None:
    pipelines.fill(lab, subjects=1, sessions=KEYS)
    make_kwargs = {"do": doing.die_at, "number": 30, "folder": str(tmp_path)}
    options = {"reserve_jobs": True, "executor": remote_executor, "keys_per_transaction": "auto"}
    summary = lab.Scripted.populate(suppress_errors=True, make_kwargs=make_kwargs, **options)
    (message,) = lab.Scripted.jobs.errors.to_arrays("error_message")
    assert "lost 3 times" in message
    assert len(lab.Scripted()) == KEYS - 1
    is_dask = hasattr(remote_executor, "scheduler")  # whose driver may have been killed, too, with its counts
    assert is_dask or summary["success_count"] == KEYS - 1
    assert len(lab.Scripted.jobs) == 1
    assert doing.begun(tmp_path).count(30) >= 3


@pytest.mark.long
def test_a_key_that_never_ends_is_told_from_those_in_its_transaction(
    lab: ModuleType, remote_executor: Any, tmp_path: Path
) -> None:
    pipelines.fill(lab, subjects=1, sessions=KEYS)
    make_kwargs = {"do": doing.never_end_at, "number": 30, "folder": str(tmp_path)}
    options = {"reserve_jobs": True, "executor": remote_executor, "keys_per_transaction": "auto"}
    summary = lab.Scripted.populate(
        suppress_errors=True, timeout_seconds=2, make_kwargs=make_kwargs, **options
    )
    ((key, message),) = summary["error_list"]
    assert message == "TimeoutError: timed out after 2 seconds"
    assert (lab.Session & key).fetch1("n") == 30
    assert summary["success_count"] == len(lab.Scripted()) == KEYS - 1


def test_a_pipeline_says_it_by_table(lab: ModuleType, commits: list[Any]) -> None:
    pipelines.fill(lab, subjects=1, sessions=KEYS)
    summary = djdist.populate(
        [lab.Square, lab.Reading], reserve_jobs=True, keys_per_transaction={"Square": np.int64(50)}
    )
    assert summary["success_count"] == 2 * KEYS
    assert {*commits} == {lab.Square}


def test_a_value_for_a_pipeline_leaves_alone_what_a_table_says_and_what_can_not(
    lab: ModuleType, commits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipelines.fill(lab, subjects=1, sessions=KEYS)
    monkeypatch.setattr(lab.Square, "keys_per_transaction", 1, raising=False)
    tables = [lab.Square, lab.Reading, lab.Tripartite]
    djdist.populate(tables, reserve_jobs=True, keys_per_transaction="auto")
    assert [len(table()) for table in tables] == [KEYS] * 3
    assert {*commits} == {lab.Reading}


def test_the_settings_say_it_for_tables_that_do_not(
    lab: ModuleType, commits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipelines.fill(lab, subjects=1, sessions=KEYS)
    monkeypatch.setattr(djdist.config, "keys_per_transaction", "auto")
    monkeypatch.setattr(lab.Square, "keys_per_transaction", 1, raising=False)
    for table in (lab.Square, lab.Reading, lab.Tripartite):
        assert table.populate()["success_count"] == KEYS
    assert {*commits} == {lab.Reading}


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "many", "8", {"Square": 0}, {"Sqare": 2}])
def test_what_can_not_be_is_refused(lab: ModuleType, value: Any) -> None:
    with pytest.raises(OptionError, match="keys_per_transaction"):
        lab.Square.populate(keys_per_transaction=value)


def test_a_make_in_three_parts_can_not_share(lab: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (lab.Tripartite, lab.TripartiteGenerator):
        with pytest.raises(OptionError, match="three parts"):
            table.populate(keys_per_transaction="auto")
    with pytest.raises(OptionError, match="three parts"):
        djdist.populate([lab.Tripartite, lab.Square], keys_per_transaction={"Tripartite": 2})
    monkeypatch.setattr(lab.Tripartite, "keys_per_transaction", 3, raising=False)
    with pytest.raises(OptionError, match="three parts"):
        lab.Tripartite.populate()


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of which tables this process has committed shared transactions."""
    from djdist.worker.make_session import MakeSession

    found: list[Any] = []
    commit = MakeSession.commit_shared

    def note_and_commit(session: MakeSession) -> None:
        found.append(type(session._table))
        commit(session)

    monkeypatch.setattr(MakeSession, "commit_shared", note_and_commit)
    return found


def test_settings_take_a_number_a_text_or_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    from djdist._settings import Settings

    for value, taken in (("auto", "auto"), ("16", 16)):
        monkeypatch.setenv("DJDIST_KEYS_PER_TRANSACTION", value)
        assert Settings().keys_per_transaction == taken
    monkeypatch.setenv("DJDIST_KEYS_PER_TRANSACTION", "0")
    with pytest.raises(OptionError, match="keys_per_transaction=0"):
        Settings()
