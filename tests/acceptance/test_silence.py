"""A database that falls silent: behind a relay that keeps its connections open, and passes nothing on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lab as pipelines
from djdist.database import dbapi, silence
from lab import doing
from lab.relay import Relay, relayed
from lab.watching import SECONDS, counts, meanwhile, wait_until
from servers import Server

CALL = """
database.port = {port}
from {lab} import Scripted
from lab import doing

make_kwargs = {{"do": doing.{do}, "folder": {folder!r}}}
Scripted.populate(reserve_jobs=True, make_kwargs=make_kwargs, {options})
"""


@pytest.fixture
def relay(server: Server, schema_name: str) -> Iterator[Relay]:
    with relayed(server.host, server.port) as relay:
        yield relay
        relay.speak_again()


@pytest.fixture
def far_lab(
    connection: Any, server: Server, relay: Relay, schema_name: str, modules_folder: Path
) -> Iterator[ModuleType]:
    """A pipeline over a relay."""
    far = replace(server, port=relay.port).configure()
    lab = pipelines.declare(schema_name, modules_folder)
    pipelines.fill(lab)
    yield lab
    pipelines.forget(lab)
    far.close()


@pytest.fixture
def doubting_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be sooner certain; what makes keys elsewhere is told by its ``make()``."""
    monkeypatch.setattr(silence, "DOUBT_SECONDS", 0.5)
    monkeypatch.setattr(silence, "ASK_SECONDS", 0.2)
    monkeypatch.setattr(silence, "CERTAIN_SECONDS", 1.0)
    monkeypatch.setattr(dbapi, "TIMEOUT_SECONDS", 2)


@pytest.mark.long_on("ray")
@pytest.mark.long_on("dask")
@pytest.mark.long_on("postgresql")
def test_a_run_whose_connections_a_relay_has_forgotten_goes_on(
    far_lab: ModuleType, relay: Relay, executor: Any, tmp_path: Path, doubting_soon: None
) -> None:
    def forget() -> None:
        wait_until(lambda: doing.begun(tmp_path), "a job")
        relay.forget()
        doing.open_gate(tmp_path)

    arguments = {"do": doing.wait_at_gate_and_soon_doubt_the_database, "folder": str(tmp_path)}
    with meanwhile(forget):
        summary = far_lab.Scripted.populate(reserve_jobs=True, executor=executor, make_kwargs=arguments)
    assert summary == {"success_count": 6, "error_list": []}
    far_lab.schema.connection.connect()
    assert counts(far_lab.Scripted) == {}


@pytest.mark.long_on("postgresql")
def test_a_query_that_takes_long_is_not_cut(far_lab: ModuleType, tmp_path: Path, doubting_soon: None) -> None:
    arguments = {"do": doing.sleep_in_the_database, "folder": str(tmp_path)}
    summary = far_lab.Scripted.populate(reserve_jobs=True, max_calls=1, make_kwargs=arguments)
    assert summary == {"success_count": 1, "error_list": []}
    assert doing.begun(tmp_path) == [1]


def test_who_waits_for_a_lock_says_whose_it_is(
    far_lab: ModuleType,
    server: Server,
    tmp_path: Path,
    doubting_soon: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = server.connect()
    other.start_transaction()
    other.query(f"UPDATE {far_lab.Session().full_table_name} SET n = n")

    def let_go() -> None:
        wait_until(lambda: f"a lock that session {other.connection_id} " in caplog.text, "the warning")
        other.cancel_transaction()

    arguments = {"do": doing.change_its_session_with_patience, "folder": str(tmp_path)}
    with meanwhile(let_go):
        summary = far_lab.Scripted.populate(reserve_jobs=True, make_kwargs=arguments)
    other.close()
    assert summary == {"success_count": 6, "error_list": []}


@pytest.mark.long
def test_what_a_worker_locked_that_lost_power_is_made_by_another_one(
    far_lab: ModuleType,
    relay: Relay,
    processes: Any,
    tmp_path: Path,
    doubting_soon: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (far_lab.Session & "n > 1").delete()

    def lose_power() -> None:
        wait_until(lambda: (tmp_path / "locked").exists(), "the lock")
        (begun,) = tmp_path.glob("*-begun-*")
        relay.forget()  # the server is told nothing, and keeps the session
        os.kill(int(begun.name.split("-")[2]), signal.SIGKILL)

    arguments = {"do": doing.lock_the_row_and_hang_the_first_time, "folder": str(tmp_path)}
    with meanwhile(lose_power):
        summary = far_lab.Scripted.populate(reserve_jobs=True, executor=processes, make_kwargs=arguments)
    assert summary == {"success_count": 1, "error_list": []}
    assert "of a dead worker on" in caplog.text
    far_lab.schema.connection.connect()
    assert counts(far_lab.Scripted) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
@pytest.mark.parametrize("options", [pytest.param("", marks=pytest.mark.long), "processes=2"])
@pytest.mark.long
def test_a_signal_ends_a_run_whose_database_is_silent(
    far_lab: ModuleType,
    relay: Relay,
    script: Callable[..., Any],
    tmp_path: Path,
    options: str,
    number: signal.Signals,
) -> None:
    code = call(far_lab, relay, tmp_path, "wait_at_gate", options)
    process = script(code, DJDIST_GRACE_SECONDS="1")
    wait_until(lambda: doing.begun(tmp_path), "a job")
    relay.fall_silent()
    doing.open_gate(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    relay.speak_again()


@pytest.mark.long
def test_ctrl_c_ends_a_query_that_would_take_long(
    far_lab: ModuleType, relay: Relay, script: Callable[..., Any], tmp_path: Path
) -> None:
    process = script(call(far_lab, relay, tmp_path, "sleep_for_long_in_the_database"))
    wait_until(lambda: doing.begun(tmp_path), "a job")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=SECONDS)
    assert "KeyboardInterrupt" in error
    assert counts(far_lab.Scripted) == {"pending": 6}


def call(lab: ModuleType, relay: Relay, folder: Path, do: str, options: str = "") -> str:
    return CALL.format(lab=lab.__name__, port=relay.port, folder=str(folder), do=do, options=options)
