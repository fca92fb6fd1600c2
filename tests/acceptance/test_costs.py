"""What a key costs the database, as counts, which no noise moves."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import djdist
import lab as pipelines
from djdist.driver import Driver
from servers import Server

FEW, MANY = 200, 1200
OF_MAKE = 4
"""BEGIN, SELECT, INSERT, COMMIT."""


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.long), 2])
def count_for_a_key(
    lab: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Any], Any]]:
    """Tells by how much one more key lets counts grow, in groups as large as on a fast machine."""
    monkeypatch.setattr(djdist.config, "task_seconds", 60.0)
    pipelines.fill(lab, subjects=1, sessions=FEW + MANY)
    with djdist.LocalExecutor(request.param) as executor:

        def count(counter: Callable[[], Any], max_calls: int) -> Any:
            before = counter()
            summary = lab.Square.populate(reserve_jobs=True, executor=executor, max_calls=max_calls)
            assert summary["success_count"] == max_calls
            return counter() - before

        yield lambda counter: (-count(counter, FEW) + count(counter, MANY)) / (MANY - FEW)


def test_a_key_costs_one_commit_and_no_statement_beyond_those_of_its_make(
    server: Server, connection: Any, count_for_a_key: Callable[[Any], Any]
) -> None:
    def commits_and_statements() -> Any:
        if server.backend == "mysql":
            return np.array([status(connection, "Com_commit"), status(connection, "Questions")])
        (number,) = connection.query("SELECT txid_current()").fetchone()  # each that writes gets one
        return np.array([int(number), 0])  # PostgreSQL does not count statements

    commits, statements = count_for_a_key(commits_and_statements)
    assert 0.95 <= commits <= 1.02
    assert statements <= OF_MAKE + 0.2


def test_who_reads_or_debugs_a_call_meets_five_functions_down_to_the_step(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, met = Driver.step, list[str]()

    def note_and_step(driver: Driver) -> bool:
        stack = traceback.extract_stack()
        met[:] = [frame.name for frame in stack if frame.filename.startswith(djdist.__path__[0])]
        return step(driver)

    monkeypatch.setattr(Driver, "step", note_and_step)
    pipelines.fill(lab, subjects=1, sessions=1)
    lab.Square.populate()
    assert met == ["populate", "drive", "drive", "run"]


def status(connection: Any, name: str) -> int:
    """Count what the server has been asked by all its clients."""
    (_, count) = connection.query(f"SHOW GLOBAL STATUS LIKE '{name}'").fetchone()
    return int(count)
