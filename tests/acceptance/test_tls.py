"""Servers that demand TLS."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import djdist
import lab as pipelines
import servers
from conftest import unavailable


@pytest.fixture(scope="module", params=["mysql", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[servers.Server]:
    """A private server that refuses connections in clear text."""
    if shutil.which("openssl") is None:
        unavailable("no openssl here to make a certificate with (Debian: apt-get install openssl)")
    tls = self_signed(tmp_path_factory.mktemp("certificate"))
    start = {"mysql": servers.private_mysql, "postgresql": servers.private_postgresql}[request.param]
    with ExitStack() as stack:
        try:
            started = stack.enter_context(start(tls))
        except servers.UnavailableError as reason:
            unavailable(str(reason))
        yield started


def self_signed(folder: Path) -> servers.Tls:
    tls = servers.Tls(folder / "certificate.pem", folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=lab"]
    subprocess.run(
        [*command, "-keyout", str(tls.key), "-out", str(tls.certificate)], check=True, capture_output=True
    )
    return tls


def test_the_server_refuses_clear_text(server: servers.Server) -> None:
    with pytest.raises(Exception, match=r"(?i)secure transport|no encryption|SSL"):
        replace(server, use_tls=False).connect()


@pytest.mark.parametrize("use_tls", [True, None])
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
