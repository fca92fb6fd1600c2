from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import djdist
import servers

EXECUTORS = ["local", "processes", "ray", "dask"]


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    """Djdist's populate and jobs on every table, for the time of a test."""
    djdist.enable()
    yield
    djdist.disable()


@pytest.fixture(scope="session")
def processes(modules_folder: Path) -> Iterator[djdist.LocalExecutor]:
    """Two processes on this machine, kept for all tests."""
    with djdist.LocalExecutor(processes=2) as executor:
        yield executor


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Any:
    """Each executor in turn, as a user gives it."""
    return _executor(request, request.param)


@pytest.fixture(params=["processes", "ray", "dask"])
def remote_executor(request: pytest.FixtureRequest) -> Any:
    """Each executor that makes keys in other processes."""
    return _executor(request, request.param)


def _executor(request: pytest.FixtureRequest, name: str) -> Any:
    if name == "ray":
        request.getfixturevalue("ray_cluster")
        return "ray"
    if name == "dask":
        return request.getfixturevalue("dask_client")
    return request.getfixturevalue("processes") if name == "processes" else "local"


@pytest.fixture
def script(server: servers.Server, tmp_path: Path, modules_folder: Path) -> Iterator[Callable[..., Any]]:
    """Runs Python code in a process of its own that is connected to the server."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        file = tmp_path / f"script_{len(started)}.py"
        file.write_text(PREAMBLE.format(server=server) + code)
        process = subprocess.Popen(
            [sys.executable, str(file), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **environment},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        end_with_children(process)
        process.communicate()


def end_with_children(process: subprocess.Popen[str]) -> None:
    """Kill all that a script has started: what is left of it would keep its output open."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()


PREAMBLE = """
import datajoint as dj
import djdist

database = dj.config.database
database.backend, database.host, database.port = {server.backend!r}, {server.host!r}, {server.port!r}
database.user, database.password = {server.user!r}, {server.password!r}
database.name = {server.database_name!r}
database.use_tls = False
djdist.enable()
"""
