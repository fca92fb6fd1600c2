"""What one driver, and several, can keep busy, on a simulated cluster."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from types import ModuleType
from typing import Any

import pytest

from benchmarks.conftest import Record
from benchmarks.goals import SIMULATED
from benchmarks.many_keys import add_numbers
from benchmarks.simulated import Cluster, SimulatedExecutor
from djdist.driver import Driver
from djdist.job import Policy
from djdist.job_stores.jobs_table import JobsTable, Owner, new_token
from djdist.jobs import jobs_of
from djdist.pipeline import JobsTableSource, jobs_table_source
from servers import Server

pytestmark = pytest.mark.timeout(1800)

CASES = {
    "1,000 places, 1 s": (1, Cluster(places=1_000, mean_seconds=1.0, keys=20_000)),
    "1,000 places, 1 s, a node dies every 2 s": (
        1,
        Cluster(places=1_000, mean_seconds=1.0, keys=20_000, death_every_seconds=2.0),
    ),
    "10,000 places, 20 s": (1, Cluster(places=10_000, mean_seconds=20.0, keys=30_000)),
    "10,000 places, 1 s, 1 driver": (1, Cluster(places=10_000, mean_seconds=1.0, keys=60_000)),
    "10,000 places, 1 s, 2 drivers": (2, Cluster(places=5_000, mean_seconds=1.0, keys=30_000)),
    "10,000 places, 1 s, 4 drivers": (4, Cluster(places=2_500, mean_seconds=1.0, keys=15_000)),
}


@pytest.mark.parametrize("case", CASES)
def test_simulated_cluster(case: str, server: Server, lab: ModuleType, record: Record) -> None:
    drivers, cluster = CASES[case]
    add_numbers(lab, drivers * cluster.keys)
    lab.Doubled()
    source = jobs_table_source(jobs_of(lab.Doubled()))
    JobsTable(source, Owner(new_token(60)))._add(5, 0)
    with ProcessPoolExecutor(drivers, multiprocessing.get_context("spawn")) as processes:
        figures = [*processes.map(drive, [source] * drivers, [cluster] * drivers)]
    assert sum(each["made"] for each in figures) == drivers * cluster.keys
    record(SIMULATED, f"{server.backend}, {case}", figures)
    print(server.backend, case, *figures, sep="\n  ")


def drive(source: JobsTableSource, cluster: Cluster) -> dict[str, Any]:
    """Do one driver's run in a process of its own."""
    store = JobsTable(source, Owner(new_token(60)))
    executor = SimulatedExecutor(cluster, store.fence(keep_completed=False), source.settings)
    began, cpu = time.monotonic(), time.process_time()
    summary = Driver(store, executor, Policy(max_calls=cluster.keys)).run(lambda status: True)
    cpu_share = (time.process_time() - cpu) / (time.monotonic() - began)
    return {"made": summary.success_count, "driver's CPU": round(cpu_share, 2)} | {
        name: round(figure, 2) for name, figure in asdict(executor.usage()).items()
    }
