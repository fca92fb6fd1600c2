"""Servers that demand TLS."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datajoint as dj
import pytest

import djdist
import lab as pipelines
import servers
from conftest import unavailable
from lab.tls_front import tls_front


@pytest.fixture(scope="module", params=["mysql", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[servers.Server]:
    """A private server that refuses connections in clear text."""
    if shutil.which("openssl") is None:
        unavailable("no openssl here to make a certificate with (Debian: apt-get install openssl)")
    tls = self_signed(tmp_path_factory.mktemp("certificate"))
    start = {"mysql": servers.private_mysql(tls), "postgresql": postgresql_behind_tls(tls)}[request.param]
    with ExitStack() as stack:
        try:
            started = stack.enter_context(start)
        except servers.UnavailableError as reason:
            unavailable(str(reason))
        yield started


@contextmanager
def postgresql_behind_tls(tls: servers.Tls) -> Iterator[servers.Server]:
    """PostgreSQL behind a front that speaks TLS for it: the embedded one was built without."""
    with servers.private_postgresql() as server, tls_front(server, tls) as port:
        yield replace(server, port=port, use_tls=True)


def self_signed(folder: Path) -> servers.Tls:
    tls = servers.Tls(folder / "certificate.pem", folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=lab"]
    subprocess.run(
        [*command, "-keyout", str(tls.key), "-out", str(tls.certificate)], check=True, capture_output=True
    )
    return tls


def test_the_server_refuses_clear_text(server: servers.Server) -> None:
    connect = dj.adapters.get_adapter(server.backend).connect
    with pytest.raises(Exception, match=r"(?i)insecure transport|access denied|server closed the connection"):
        connect(
            host=server.host,
            port=server.port,
            user=server.user,
            password=server.password,
            dbname=server.database_name,
            use_tls=False,
        )


@pytest.mark.parametrize("use_tls", [True, None])
@pytest.mark.long_on("mysql-None")
def test_keys_are_made_over_tls(
    connection: Any,
    server: servers.Server,
    schema_name: str,
    modules_folder: Path,
    processes: djdist.LocalExecutor,
    use_tls: bool | None,
) -> None:
    replace(server, use_tls=use_tls).configure()
    lab = pipelines.declare(schema_name, modules_folder)
    pipelines.fill(lab)
    options = {"reserve_jobs": True, "max_calls": 3}
    assert lab.Square.populate(**options)["success_count"] == 3
    assert lab.Square.populate(executor=processes, **options)["success_count"] == 3
    pipelines.forget(lab)
