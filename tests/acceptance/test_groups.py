"""Keys that share a task."""

from __future__ import annotations

import datetime
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from djdist._job import GROUP_SECONDS
from djdist.driver.overdue import CLOCKS_DIFFER_SECONDS
from djdist.worker.session import MariaDBSession, PlannedSession, is_mariadb
from servers import Server

SLOW_SECONDS = 2 * (GROUP_SECONDS + CLOCKS_DIFFER_SECONDS)


@pytest.mark.long
def test_a_slow_key_holds_back_none_of_its_group(lab: ModuleType) -> None:
    pipelines.fill(lab, subjects=1, sessions=400)
    slow_date = pipelines.FIRST_DATE + datetime.timedelta(days=200)
    nap = {"seconds": SLOW_SECONDS, "slow_date": slow_date}
    summary = lab.Logged.populate(reserve_jobs=True, processes=2, make_kwargs=nap)
    assert summary == {"success_count": 400, "error_list": []}
    is_slow = {"session_date": slow_date}
    slow_ends_at = (lab.Logged & is_slow).fetch1("monotonic_ns") + SLOW_SECONDS * 1e9
    assert max((lab.Logged - is_slow).to_arrays("monotonic_ns")) < slow_ends_at


def test_nothing_prepared_stays_on_the_callers_connection(
    server: Server, lab: ModuleType, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(djdist.config, "task_seconds", 60.0)  # or a slow machine has no large groups
    kind = MariaDBSession if server.backend == "mysql" else PlannedSession
    if kind is MariaDBSession and not is_mariadb(connection._conn):
        pytest.skip("nothing is prepared on MySQL")
    prepared = []
    prepare = kind._prepare

    def note(session: Any, query: str, count: int, name: str) -> str:
        prepared.append(prepare(session, query, count, name))
        return prepared[-1]

    monkeypatch.setattr(kind, "_prepare", note)
    pipelines.fill(lab, subjects=1, sessions=100)
    assert lab.Square.populate(reserve_jobs=True)["success_count"] == 100
    assert prepared
    assert all(prepared)
    for name in prepared:
        with pytest.raises(Exception, match=name):
            connection._conn.cursor().execute(f"DEALLOCATE PREPARE {name}")
