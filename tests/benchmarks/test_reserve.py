"""How long it takes to reserve 100 jobs, the more are pending, beside the bare statements."""

from __future__ import annotations

import statistics
from types import ModuleType

import pytest

from benchmarks.conftest import Record
from benchmarks.goals import RESERVE
from benchmarks.many_keys import (
    add_numbers,
    bare_refresh,
    bare_reserve,
    empty_jobs,
    seconds,
    update_statistics,
)
from djdist.job_stores.jobs_table.lease import new_token
from djdist.job_stores.jobs_table.store import JobsTable, Owner
from djdist.jobs.table import jobs_of
from djdist.pipeline.jobs_table import jobs_table_spec
from servers import Server

pytestmark = pytest.mark.timeout(1800)

LIMIT = 100
PENDING = (10_000, 100_000, 1_000_000)
ROUNDS = 30


def test_reserve(server: Server, lab: ModuleType, record: Record) -> None:
    times: dict[str, dict[int, float]] = {"bare": {}, "djdist": {}}
    for pending in PENDING:
        lab.Number.delete_quick()
        empty_jobs(lab)
        add_numbers(lab, pending)
        bare_refresh(lab)
        update_statistics(jobs_of(lab.Doubled()))
        for name, milliseconds in _milliseconds(lab).items():
            times[name][pending] = milliseconds
    record(RESERVE, server.backend, times)
    growth = {name: f"{each[PENDING[-1]] / each[PENDING[0]]:.2f}" for name, each in times.items()}
    print(f"{server.backend}: {times} ms, growth {growth}")


def _milliseconds(lab: ModuleType) -> dict[str, float]:
    store = JobsTable(jobs_table_spec(jobs_of(lab.Doubled())), Owner(new_token(60)))
    acts = {"bare": lambda: bare_reserve(lab, LIMIT), "djdist": lambda: store.reserve(LIMIT)}
    times: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(ROUNDS):
        for name, act in acts.items():
            times[name].append(1000 * seconds(act))
    store.close()
    return {name: round(statistics.median(each), 2) for name, each in times.items()}
