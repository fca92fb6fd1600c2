"""How many statements a key costs as workers are added."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.conftest import Record
from benchmarks.contestants import Bench, empty, questions
from benchmarks.goals import SHARED, STATEMENTS
from servers import Server

KEYS = 2_000
WORKERS = (1, 2, 8, 32)


def test_statements_over_workers(server: Server, lab: ModuleType, tmp_path: Path, record: Record) -> None:
    if server.backend != "mysql":
        pytest.skip("PostgreSQL does not count statements")
    lab.Number.insert({"n": n, "x": n} for n in range(KEYS))
    bench = Bench(server, lab.__name__, tmp_path, {})

    def statements(name: str, workers: int) -> float:
        empty(lab)
        lab.Doubled.jobs.refresh()
        before = questions(lab.schema.connection)
        bench.make(name, workers)
        return round((questions(lab.schema.connection) - before) / KEYS, 2)

    names = ("native workers", "local", SHARED)
    counts = {name: {str(n): statements(name, n) for n in WORKERS} for name in names}
    record(STATEMENTS, server.backend, counts)
    assert counts["local"]["32"] < counts["native workers"]["1"]
