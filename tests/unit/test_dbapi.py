"""The driver connects as DataJoint does, though it does without it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import datajoint as dj
import pymysql
import pytest

from djdist.database import dbapi

pytest.importorskip("psycopg2")
import psycopg2

DRIVERS = {"mysql": pymysql, "postgresql": psycopg2}
LOGIN = {"host": "db.lab", "port": 3307, "user": "me", "password": "p4ss", "database_name": "lab"}
TIMEOUTS = {"connect_timeout": 10, "read_timeout": 10}


@pytest.fixture(params=[*DRIVERS])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def asked(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What the database's driver is asked for, in order."""
    asked: list[dict[str, Any]] = []
    line = socket.socket()
    names = {"passwd": "password"}  # the deprecated one

    def connect(**arguments: Any) -> Any:
        asked.append({names.get(k, k): v for k, v in arguments.items()})
        return SimpleNamespace(autocommit=arguments.get("autocommit"), fileno=line.fileno, cursor=Mock())

    monkeypatch.setattr(DRIVERS[backend], "connect", connect)
    with line:
        yield asked


def connected(backend: str, use_tls: Any) -> Any:
    return dbapi.connect(backend, {**LOGIN, "use_tls": use_tls}, "utf8mb4")


@pytest.mark.parametrize("use_tls", [True, False, {"ca": "ca.pem"}])
@pytest.mark.parametrize("database", ["lab", None])
def test_it_asks_for_what_datajoint_asks_for(
    backend: str,
    use_tls: Any,
    database: str | None,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(LOGIN, "database_name", database)
    ours = connected(backend, use_tls)
    place = {k: v for k, v in LOGIN.items() if k != "database_name"}
    named = {"dbname": database} if database else {}
    theirs = dj.adapters.get_adapter(backend).connect(**place, **named, charset="utf8mb4", use_tls=use_tls)
    assert asked[0] == asked[1] | ({} if backend == "postgresql" else TIMEOUTS)
    assert ours.autocommit is theirs.autocommit is True


def test_tls_may_be_missing_where_nothing_is_said_of_it(
    backend: str, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for use_tls in (True, False):
        connected(backend, use_tls)
    with_tls, without = asked
    refusal: OSError = ConnectionError("no TLS here")
    note = vars(DRIVERS[backend])["connect"]

    def connect(**arguments: Any) -> Any:
        line = note(**arguments)
        if asked[-1] == with_tls:
            raise refusal
        return line

    monkeypatch.setattr(DRIVERS[backend], "connect", connect)
    connected(backend, None)
    assert asked[2:] == [with_tls, without]
    with pytest.raises(ConnectionError):
        connected(backend, True)
    refusal = TimeoutError("timed out")
    with pytest.raises(TimeoutError):
        connected(backend, None)
