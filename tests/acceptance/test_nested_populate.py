"""What make() may do with transactions: end its own, and populate other tables where none is open."""

from __future__ import annotations

import importlib
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import djdist
import lab as pipelines
from lab.watching import SECONDS, counts, wait_until

Script = Callable[..., "subprocess.Popen[str]"]

TABLES = ["Needing", "Restarting"]
MADE = [*TABLES, "Square", "Fragile"]


def rows(lab: ModuleType) -> dict[str, list[dict[str, Any]]]:
    return {name: getattr(lab, name)().to_dicts(order_by="KEY") for name in MADE}


@pytest.fixture
def native(new_schema_name: Callable[[], str], connection: Any, modules_folder: Path) -> Any:
    """The same pipeline, filled and populated by plain DataJoint."""
    lab = pipelines.declare(new_schema_name(), modules_folder)
    pipelines.fill(lab)
    djdist.disable()
    for table in TABLES:
        getattr(lab, table).populate(suppress_errors=True)
    djdist.enable()
    yield lab
    pipelines.forget(lab)


@pytest.mark.parametrize("reserve_jobs", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.long_on("processes-True")
def test_a_make_that_populates_what_it_needs(
    lab: ModuleType, native: ModuleType, executor: Any, reserve_jobs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(djdist.config, "executor", "nowhere")
    pipelines.fill(lab)
    options = {"reserve_jobs": reserve_jobs, "executor": executor, "suppress_errors": True}
    nested = {"make_kwargs": {"options": {"reserve_jobs": reserve_jobs}}}
    summary = lab.Needing.populate(**options, **nested)
    assert sorted(message for _, message in summary["error_list"]) == [
        "PipelineError: after what it needs",
        "ValueError: bad n 5",
    ]
    assert summary["success_count"] == len(native.Needing()) == 4
    assert lab.Restarting.populate(**options, **nested)["error_list"] == []
    assert rows(lab) == rows(native)
    if reserve_jobs:
        assert counts(lab.Needing) == {"error": 2}
        assert counts(lab.Restarting) == counts(lab.Square) == {}


@pytest.mark.long_on("ray")
def test_a_make_that_populates_in_a_thread(lab: ModuleType, remote_executor: Any) -> None:
    def populate_other(table: Any, key: dict[str, Any], n: int) -> None:
        square = importlib.import_module(type(table).__module__).Square
        table.connection.cancel_transaction()
        with ThreadPoolExecutor() as pool:
            assert pool.submit(square.populate, key).result()["success_count"] == 1
        table.connection.start_transaction()

    pipelines.fill(lab)
    options = {"reserve_jobs": True, "executor": remote_executor, "make_kwargs": {"do": populate_other}}
    assert lab.Scripted.populate(**options) == {"success_count": 6, "error_list": []}
    assert len(lab.Square()) == 6


@pytest.mark.parametrize("reserve_jobs", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_make_that_commits_itself(lab: ModuleType, executor: Any, reserve_jobs: bool) -> None:
    def commit(table: Any, key: dict[str, Any], n: int) -> None:
        if n % 3:
            table.connection.commit_transaction()
        if n % 3 == 2:
            table.connection.start_transaction()

    pipelines.fill(lab, subjects=2, sessions=30)
    options = {"reserve_jobs": reserve_jobs, "executor": executor, "make_kwargs": {"do": commit}}
    assert lab.Scripted.populate(**options) == {"success_count": 60, "error_list": []}
    assert len(lab.Scripted()) == 60
    assert not reserve_jobs or counts(lab.Scripted) == {}


INTERRUPTED = """
import {module} as lab


def populate_other(table, key, n):
    table.connection.cancel_transaction()
    lab.Logged.populate(key, make_kwargs={{"seconds": 1000}}, reserve_jobs=True)


lab.Scripted.populate(reserve_jobs=True, suppress_errors=True, make_kwargs={{"do": populate_other}})
"""


@pytest.mark.on("local")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
@pytest.mark.long
def test_an_interrupt_in_what_make_populates_is_no_error(
    lab: ModuleType, script: Script, number: signal.Signals
) -> None:
    pipelines.fill(lab)
    jobs = lab.Logged.jobs
    process = script(INTERRUPTED.format(module=lab.__name__))
    wait_until(lambda: len(jobs.reserved & "pid > 0"), "the nested make()")
    process.send_signal(number)
    assert process.wait(SECONDS) != 0
    assert counts(lab.Scripted) == {"pending": 6}
    assert counts(lab.Logged) == {"pending": 1}


@pytest.mark.on("local")
def test_a_datajoint_that_commits_elsewhere_is_refused(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    populate1 = dj.AutoPopulate._populate1

    def populate_otherwise(self: Any, *arguments: Any, **options: Any) -> Any:
        return populate1(self, *arguments, **options)

    pipelines.fill(lab)
    monkeypatch.setattr(dj.AutoPopulate, "_populate1", populate_otherwise)
    with pytest.raises(djdist.IncompatibleDataJointError, match=f"DataJoint {dj.__version__} has made"):
        lab.Square.populate(reserve_jobs=True)
    assert counts(lab.Square)["error"] == 1
