"""Sessions as servers, accounts and clients set them up."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import djdist
import lab as pipelines
from djdist.job_stores.jobs_table.lease import new_token
from djdist.job_stores.jobs_table.store import JobsTable, Owner
from djdist.jobs.history import rate, runs_seen
from djdist.pipeline.jobs_table import jobs_table_spec
from djdist.worker.session import is_mariadb
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


@pytest.fixture
def other_zone(request: pytest.FixtureRequest, server: Server, connection: Any) -> Callable[[int], None]:
    """Puts this process, on PostgreSQL also its workers, into a time zone so many hours further east."""
    if server.backend == "postgresql":
        log_in = request.getfixturevalue("log_in")
        return lambda hours: log_in(timezone=f"Etc/GMT{-hours:+}")
    return lambda hours: connection.query(f"SET SESSION time_zone = '{hours:+03}:00'")


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
@pytest.mark.long_on("serializable")
def test_a_strict_isolation_of_the_account_keeps_no_job_from_ending(
    log_in: LogIn, lab: ModuleType, processes: Any, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(default_transaction_isolation=isolation)
    pipelines.fill(lab, subjects=1, sessions=2)
    make_beyond_a_renewal(lab, "local", monkeypatch)
    lab.Scripted.delete()
    make_beyond_a_renewal(lab, processes, monkeypatch)


@pytest.mark.parametrize("hours", [pytest.param(-7, marks=pytest.mark.long), 9])
def test_no_time_zone_of_a_client_hides_or_frees_jobs(
    other_zone: Callable[[int], None], lab: ModuleType, server: Server, processes: Any, hours: int
) -> None:
    pipelines.fill(lab, subjects=1, sessions=4)
    lab.Scripted.jobs.refresh()
    options = {"reserve_jobs": True, "refresh": False, "make_kwargs": {"do": doing.nothing}}
    with (
        server.connect() as native,
        closing(JobsTable(jobs_table_spec(lab.Scripted.jobs), Owner(new_token(60)))) as other_run,
        dj.config.override(jobs__keep_completed=True),
    ):
        assert len(other_run.reserve(1)) == 1
        other_zone(hours)
        assert lab.Scripted.jobs.rescue() == 0
        assert [run.is_dead for run in runs_seen(lab.Scripted.jobs)] == [False]
        assert lab.Scripted.populate(max_calls=2, **options)["success_count"] == 2
        assert lab.Scripted.populate(executor=processes, **options)["success_count"] == 1
        assert rate(lab.Scripted.jobs) > 0
        jobs = dj.FreeTable(native, lab.Scripted.jobs.full_table_name)
        completed = jobs & "status = 'success'" & "completed_time <= CURRENT_TIMESTAMP(3)"
        assert len(completed & "completed_time > CURRENT_TIMESTAMP(3) - INTERVAL '10' MINUTE") == 3


def test_native_workers_find_what_was_refreshed_from_another_time_zone(
    other_zone: Callable[[int], None], lab: ModuleType, server: Server
) -> None:
    pipelines.fill(lab, subjects=1, sessions=2)
    other_zone(9)
    lab.Scripted.jobs.refresh()
    with server.connect() as native:
        jobs = dj.FreeTable(native, lab.Scripted.jobs.full_table_name)
        assert len(jobs & "scheduled_time <= CURRENT_TIMESTAMP(3)") == 2


def test_a_make_sees_the_time_zone_that_its_account_has(
    log_in: LogIn, lab: ModuleType, processes: Any
) -> None:
    log_in(timezone="Asia/Tokyo")
    pipelines.fill(lab, subjects=1, sessions=2)
    options = {"reserve_jobs": True, "make_kwargs": {"do": doing.check_time_zone, "expected": "Asia/Tokyo"}}
    lab.Scripted.populate(max_calls=1, **options)
    lab.Scripted.populate(executor=processes, **options)
    assert len(lab.Scripted()) == 2


@pytest.fixture
def short_of_time(server: Server, connection: Any) -> Iterator[str]:
    """Lets the server end sessions that idle for a second; gives the setting's name."""
    if server.backend == "postgresql":
        setting = "idle_in_transaction_session_timeout"
        change, undo = (
            f"ALTER ROLE {server.user} {how}" for how in (f"SET {setting} = '1s'", f"RESET {setting}")
        )
    else:
        setting = "wait_timeout"
        change, undo = (f"SET GLOBAL {setting} = {value}" for value in ("1", "DEFAULT"))
    connection.query(change)
    connection.connect()
    yield setting
    with server.connect() as other:
        other.query(undo)
    connection.connect()


@pytest.mark.long_on("mysql-True")
@pytest.mark.long_on("postgresql-False")
@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.long_on("postgresql-True")
@pytest.mark.long
def test_an_idle_session_that_the_server_ends_is_named(
    short_of_time: str, lab: ModuleType, remote: bool, tmp_path: Path
) -> None:
    pipelines.fill(lab, subjects=1, sessions=1)
    fresh = djdist.LocalExecutor(processes=2)  # whose sessions begin with the limit
    options = {"executor": fresh if remote else "local", "suppress_errors": True, "reserve_jobs": True}
    idle = {"do": doing.idle_until_the_session_ends, "folder": str(tmp_path)}
    ((_, message),) = lab.Scripted.populate(make_kwargs=idle, **options)["error_list"]
    assert f"The server's {short_of_time} ended the session" in message
    assert len(doing.begun(tmp_path)) <= 6


@pytest.mark.long_on("postgresql")
@pytest.mark.parametrize("remote", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_statement_that_takes_too_long_is_an_error_that_names_the_limit(
    lab: ModuleType, processes: Any, server: Server, remote: bool, tmp_path: Path
) -> None:
    pipelines.fill(lab, subjects=1, sessions=1)
    options = {"executor": processes if remote else "local", "suppress_errors": True, "reserve_jobs": True}
    limit = "statement_timeout"
    if server.backend == "mysql":
        limit = "max_statement_time" if is_mariadb(lab.schema.connection._conn) else "max_execution_time"
    sleep = {"do": doing.exceed_a_limit, "folder": str(tmp_path), "limit_name": limit}
    ((_, message),) = lab.Scripted.populate(make_kwargs=sleep, **options)["error_list"]
    assert f"The server's {limit} ended" in message
    assert len(doing.begun(tmp_path)) <= 6


def test_a_driver_waits_for_a_lock_though_its_statements_may_not_take_long(
    log_in: LogIn, lab: ModuleType, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    pipelines.fill(lab, subjects=1, sessions=2)
    lab.Scripted.jobs.refresh()
    log_in(statement_timeout="200ms")
    with server.connect() as other, ThreadPoolExecutor() as threads, other.transaction:
        other.query(f"LOCK TABLE {lab.Scripted.jobs.full_table_name} IN ACCESS EXCLUSIVE MODE")
        options = {"reserve_jobs": True, "refresh": False, "make_kwargs": {"do": doing.nothing}}
        run = threads.submit(lab.Scripted.populate, **options)
        while not run.done() and "Waiting for the database" not in caplog.text:
            time.sleep(0.01)
        other.query("COMMIT")
        assert run.result() == {"success_count": 2, "error_list": []}


def test_workers_say_nothing_of_tls_that_the_server_lacks(
    lab: ModuleType, server: Server, script: Callable[..., Any]
) -> None:
    if server.backend != "postgresql":
        pytest.skip("the private MariaDB speaks TLS")
    pipelines.fill(lab, subjects=1, sessions=2)
    process = script(WITHOUT_TLS.format(module=lab.__name__))
    output = "".join(process.communicate(timeout=120))
    assert "2 errors" in output
    assert output.count("SSL connection failed") == 1  # the caller's


WITHOUT_TLS = """
database.use_tls = None
if __name__ == "__main__":
    import {module} as pipeline
    from lab import doing

    options = {{"reserve_jobs": True, "suppress_errors": True, "make_kwargs": {{"do": doing.exit_python}}}}
    for _ in range(2):
        errors = pipeline.Scripted.populate(processes=2, **options)["error_list"]
        pipeline.Scripted.jobs.retry()
    print(len(errors), "errors")
"""
