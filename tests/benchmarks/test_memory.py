"""How much memory a driver takes for a million pending keys."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import ModuleType

import psutil
import pytest

from benchmarks.conftest import Record
from benchmarks.goals import MEMORY
from benchmarks.simulated import EagerPool, fill
from djdist._job import Policy, Recipe, Status
from djdist.job_stores.jobs_table.lease import new_token
from djdist.job_stores.jobs_table.store import JobsTable, Owner
from djdist.pipeline.jobs_table_spec import JobsTableSpec
from lab.scripted import driver_of
from servers import Server

pytestmark = pytest.mark.timeout(1800)

KEYS = 1_000_000
MADE = 50_000
PLACES = 1_000
MB = 1e6


def test_memory_with_a_million_pending_keys(server: Server, lab: ModuleType, record: Record) -> None:
    spec = fill(lab, KEYS)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        grown = process.submit(grown_by, spec).result()
    record(MEMORY, server.backend, grown)
    assert grown < 200


def grown_by(spec: JobsTableSpec) -> float:
    """Let a driver's run begin in a process of its own, and tell by how many MB it grows at most."""
    process = psutil.Process()
    sizes = [process.memory_info().rss]

    def watch(status: Status) -> bool:
        sizes.append(process.memory_info().rss)
        return True

    policy = Policy(max_calls=MADE, count_pending=True)
    driver_of(JobsTable(spec, Owner(new_token(60))), EagerPool(PLACES), policy, Recipe(spec.table)).run(watch)
    return round((max(sizes) - sizes[0]) / MB, 1)
