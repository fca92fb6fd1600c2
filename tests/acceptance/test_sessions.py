"""Sessions as servers, accounts and clients set them up."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from lab import doing
from lab.watching import counts
from servers import Server

LogIn = Callable[..., None]


@pytest.fixture
def log_in(server: Server, connection: Any) -> Iterator[LogIn]:
    """Gives this process and its workers an account with session settings of its own, on PostgreSQL."""
    if server.backend != "postgresql":
        pytest.skip("only PostgreSQL keeps settings with its accounts")
    name = f"djdist_{uuid.uuid4().hex[:8]}"
    connection.query(f"CREATE ROLE {name} SUPERUSER LOGIN PASSWORD '{server.password}'")

    def log_in(**settings: str) -> None:
        for setting, value in settings.items():
            connection.query(f"ALTER ROLE {name} SET {setting} = '{value}'")
        connection.conn_info.update(user=name)
        connection.connect()

    yield log_in
    connection.conn_info.update(user=server.user)
    connection.connect()
    connection.query(f"DROP OWNED BY {name}; DROP ROLE {name}")


def make_beyond_a_renewal(lab: ModuleType, executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(djdist.config, "lease_seconds", 2)
    wait = {"do": doing.wait_for_a_renewal}
    result = lab.Scripted.populate(reserve_jobs=True, executor=executor, make_kwargs=wait)
    assert result == {"success_count": 2, "error_list": []}
    assert counts(lab.Scripted) == {}


@pytest.mark.long_on("ray")
@pytest.mark.long_on("dask")
def test_a_make_that_outlasts_a_renewal_ends(
    lab: ModuleType, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipelines.fill(lab, subjects=1, sessions=2)
    make_beyond_a_renewal(lab, executor, monkeypatch)


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_a_strict_isolation_of_the_account_keeps_no_job_from_ending(
    log_in: LogIn, lab: ModuleType, processes: Any, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(default_transaction_isolation=isolation)
    pipelines.fill(lab, subjects=1, sessions=2)
    make_beyond_a_renewal(lab, "local", monkeypatch)
    lab.Scripted.delete()
    make_beyond_a_renewal(lab, processes, monkeypatch)
