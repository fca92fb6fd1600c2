"""Connections notice that their server's machine is gone, and wait for one that is slow."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from conftest import unavailable
from djdist.database import dbapi
from lab.relay import Relay, lost_packets, relayed
from lab.watching import meanwhile
from servers import Server

ADDRESS = f"127.77.{os.getpid() % 250}.{os.getpid() // 250 % 250 + 1}"
SLEEP = {"mysql": "SELECT SLEEP({})", "postgresql": "SELECT pg_sleep({})"}
SOON = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 1, "TCP_USER_TIMEOUT": 2000}

Connect = Callable[[], Any]


@pytest.fixture
def relay(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    if os.geteuid() or not shutil.which("ip") or not hasattr(socket, "TCP_USER_TIMEOUT"):
        unavailable("only root on Linux can lose packets, with iproute2")
    monkeypatch.setattr(dbapi, "KEEPALIVE", SOON)
    with relayed(server.host, server.port, ADDRESS) as relay:
        yield relay


@pytest.fixture
def connect(server: Server, relay: Relay) -> Connect:
    login = {
        "host": ADDRESS,
        "port": relay.port,
        "user": server.user,
        "password": server.password,
        "database_name": server.database_name,
        "use_tls": None,
    }
    return lambda: dbapi.connect(server.backend, login, "utf8mb4")


@pytest.mark.long_on("postgresql")
def test_a_server_that_is_gone_is_noticed_while_it_owes_an_answer(server: Server, connect: Connect) -> None:
    connection, noticed = connect(), threading.Event()
    connection.cursor().execute(SLEEP[server.backend].format(2.5))  # it is longer silent than it may be gone

    def be_gone() -> None:
        with lost_packets(ADDRESS):
            assert noticed.wait(60)

    with meanwhile(be_gone):
        with pytest.raises(Exception, match="timed out"):
            connection.cursor().execute(SLEEP[server.backend].format(100))
        noticed.set()


@pytest.mark.long_on("postgresql")
def test_a_server_that_is_gone_is_noticed_when_it_is_asked(server: Server, connect: Connect) -> None:
    connection = connect()
    with lost_packets(ADDRESS), pytest.raises(Exception, match="timed out"):
        connection.cursor().execute(SLEEP[server.backend].format(0))


@pytest.mark.long_on("postgresql")
def test_a_server_that_takes_a_connection_and_says_nothing_is_not_waited_for(
    relay: Relay, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dbapi, "TIMEOUT_SECONDS", 2)
    relay.fall_silent()
    with pytest.raises(Exception, match=r"timed out|timeout expired"):
        connect()


def test_postgresql_soon_ends_the_session_of_a_client_that_is_gone(server: Server, connect: Connect) -> None:
    if server.backend == "mysql":
        pytest.skip("only PostgreSQL lets a session say so")
    cursor = connect().cursor()
    cursor.execute("SELECT current_setting('tcp_keepalives_idle'), current_setting('tcp_user_timeout')")
    assert cursor.fetchone() == ("15", "60000")
