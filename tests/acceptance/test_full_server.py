"""A server that takes too few connections slows a run down, but fails none of its keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
import servers
from djdist.job_stores.jobs_table import transactions
from lab.watching import counts, meanwhile, wait_until

DRIVERS = 2


@pytest.fixture(scope="module", params=["mysql", "postgresql"])
def server(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    private = {"mysql": servers.private_mysql, "postgresql": servers.private_postgresql}[request.param]
    with private(max_connections=20) as server:
        yield server


@pytest.mark.parametrize("left", [DRIVERS + 1])
@pytest.mark.long
def test_workers_that_get_no_connection_cost_no_key(
    lab: ModuleType, server: servers.Server, left: int
) -> None:
    pipelines.fill(lab, subjects=2, sessions=6)
    assert lab.Square.jobs.refresh()["added"] == 12
    with leaving(server, left):
        summary = lab.Square.populate(
            reserve_jobs=True, executor=djdist.LocalExecutor(processes=left), suppress_errors=True
        )
    assert summary == {"success_count": 12, "error_list": []}
    assert counts(lab.Square) == {}


def test_a_run_waits_until_there_is_one_for_its_driver(
    lab: ModuleType, server: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipelines.fill(lab, subjects=1, sessions=2)
    lab.Square.jobs.refresh()
    with leaving(server, 0) as others:

        def make_room() -> None:
            wait_until(lambda: refused, "an attempt to connect")
            for _ in range(DRIVERS):
                others.pop().close()

        refused: list[BaseException] = []
        noting(monkeypatch, refused)
        with meanwhile(make_room):
            assert lab.Square.populate(reserve_jobs=True)["success_count"] == 2


@contextmanager
def leaving(server: servers.Server, left: int) -> Iterator[list[Any]]:
    """Take all connections of a server but so many."""
    taken: list[Any] = []
    try:
        while True:
            try:
                taken.append(server.connect())
            except Exception:
                break
        for _ in range(left):
            taken.pop().close()
        yield taken
    finally:
        for connection in taken:
            connection.close()


def noting(monkeypatch: pytest.MonkeyPatch, refused: list[BaseException]) -> None:
    """Note what the driver is told when it can't connect."""
    connect = vars(transactions)["connect"]

    def connect_or_note(*login: Any) -> Any:
        try:
            return connect(*login)
        except Exception as error:
            refused.append(error)
            raise

    monkeypatch.setattr(transactions, "connect", connect_or_note)
