"""Keeps what the benchmarks find in `results.json`, renews the docs, and sets it beside the goals."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import servers
from benchmarks import charts, goals, page
from benchmarks.contestants import PIPELINE
from lab import clusters

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
Record = Callable[[str, str, Any], None]


@pytest.fixture(params=["mysql", "postgresql"], scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    """A server that is durable as a lab's is: what a commit costs is a part of what is compared."""
    with servers.running(request.param, durable=True) as server:
        yield server


@pytest.fixture
def lab(server: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmarked pipeline as a module that workers can import."""
    connection = server.configure()
    name = f"djdist_bench_{uuid.uuid4().hex[:8]}"
    (tmp_path / f"{name}.py").write_text(PIPELINE.format(schema=name))
    paths = [str(tmp_path), str(HERE.parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setattr(sys, "path", paths + sys.path)
    yield __import__(name)
    connection.close()
    server.drop_schema(name)


@pytest.fixture
def environments() -> Iterator[dict[str, dict[str, str]]]:
    """How a script finds the clusters that run beside it."""
    with clusters.place("ray", cpus_of_nodes=[2]) as ray, clusters.place("dask") as dask:
        yield {"ray": ray.environment, "dask": dask.environment}


@pytest.fixture(scope="session")
def record() -> Iterator[Record]:
    """Notes figures by topic and database, beside those of earlier benchmarks."""
    results = known_results()
    yield lambda topic, database, figures: results.setdefault(topic, {}).update({database: figures})
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def known_results() -> dict[str, dict[str, Any]]:
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    results = known_results()
    charts.draw(results, HERE)
    page.renew(results)
    terminalreporter.write_sep("=", "goals")
    terminalreporter.write_line(goals.table(results))
