"""What one driver, and several that share a table, can keep busy on a simulated cluster."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa

from benchmarks import thirty_tables
from benchmarks.conftest import Record
from benchmarks.simulated import Cluster, EagerPool, SimulatedPool, fill
from benchmarks.thirty_tables import Pipeline, store_of
from djdist._job import Policy, Recipe
from djdist._job_store import JobStore
from djdist.driver import Driver, RunContext
from djdist.job_stores.jobs_table.lease import new_token
from djdist.job_stores.jobs_table.store import JobsTable, Owner
from djdist.pipeline.jobs_table_spec import JobsTableSpec
from lab.scripted import driver_of
from servers import Server

pytestmark = pytest.mark.timeout(1800)

SIMULATED = "simulated clusters"
SATURATED = "drivers that never wait"
KEYS_TO_SATURATE = 60_000
CASES = {
    "1,000 slots, 1 s": (1, Cluster(slots=1_000, mean_seconds=1.0, keys=20_000)),
    "1,000 slots, 1 s, Pareto, a node dies every 2 s": (
        1,
        Cluster(1_000, mean_seconds=1.0, keys=20_000, death_every_seconds=2.0, lengths="Pareto"),
    ),
    "10,000 slots, 20 s": (1, Cluster(slots=10_000, mean_seconds=20.0, keys=30_000)),
    "10,000 slots, 1 s, 1 driver": (1, Cluster(slots=10_000, mean_seconds=1.0, keys=60_000)),
    "10,000 slots, 1 s, 2 drivers": (2, Cluster(slots=5_000, mean_seconds=1.0, keys=30_000)),
    "10,000 slots, 1 s, 4 drivers": (4, Cluster(slots=2_500, mean_seconds=1.0, keys=15_000)),
}
NUMBERS = 24_000
OF_PIPELINE = {
    "10,000 slots, 30 tables, 20 s": Cluster(slots=10_000, mean_seconds=20.0, keys=40_000),
}


@pytest.mark.parametrize("case", CASES)
def test_simulated_cluster(case: str, server: Server, lab: ModuleType, record: Record) -> None:
    drivers, cluster = CASES[case]
    spec = fill(lab, drivers * cluster.keys)
    with ProcessPoolExecutor(drivers, multiprocessing.get_context("spawn")) as processes:
        figures = [*processes.map(drive_table, [spec] * drivers, [cluster] * drivers)]
    assert all(each["busy_share"] > 0.5 for each in figures)
    record(SIMULATED, f"{server.backend}, {case}", figures)
    print(server.backend, case, *figures, sep="\n  ")


@pytest.mark.parametrize("case", OF_PIPELINE)
def test_simulated_cluster_with_a_pipeline(
    case: str, server: Server, lab: ModuleType, record: Record
) -> None:
    pipeline = thirty_tables.fill(lab, NUMBERS)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        figures = [*processes.map(drive_pipeline, [pipeline], [OF_PIPELINE[case]])]
    assert all(each["busy_share"] > 0.5 for each in figures)
    record(SIMULATED, f"{server.backend}, {case}", figures)
    print(server.backend, case, *figures, sep="\n  ")


@pytest.mark.parametrize("slots", [1_000, 10_000])
@pytest.mark.parametrize("drivers", [1, 2, 4])
def test_saturated_drivers(drivers: int, slots: int, server: Server, lab: ModuleType, record: Record) -> None:
    spec = fill(lab, KEYS_TO_SATURATE)
    with ProcessPoolExecutor(drivers, multiprocessing.get_context("spawn")) as processes:
        spans = [*processes.map(saturate, [spec] * drivers, [slots] * drivers, [drivers] * drivers)]
    began_at, ended_at, cpu_seconds = zip(*spans, strict=True)
    rate = KEYS_TO_SATURATE / (max(ended_at) - min(began_at))
    figures = {
        "jobs per second": round(rate),
        "CPU milliseconds a job": round(sum(cpu_seconds) / KEYS_TO_SATURATE * 1000, 3),
    }
    record(SATURATED, f"{server.backend}, {drivers} drivers, {slots:,} in flight each", figures)
    print(server.backend, drivers, slots, figures)


def saturate(spec: JobsTableSpec, slots: int, drivers: int) -> tuple[float, float, float]:
    """Give a driver no pause; tell from when to when it ran and how much of its thread's time that took."""
    pool = EagerPool(slots)
    policy = Policy(max_calls=KEYS_TO_SATURATE // drivers)
    cpu = time.thread_time()
    driver_of(JobsTable(spec, Owner(new_token(60))), pool, policy, Recipe(spec.table)).run(
        lambda status: True
    )
    return pool.began_at, pool.ended_at, time.thread_time() - cpu


def drive_table(spec: JobsTableSpec, cluster: Cluster) -> dict[str, Any]:
    """Do one driver's run of one table in a process of its own."""
    store = JobsTable(spec, Owner(new_token(60)))
    pool = SimulatedPool(cluster, {spec.table: store.job_statements()}, spec.settings)
    return drive(store, pool, {spec.table: Recipe(spec.table)}, cluster)


def drive_pipeline(pipeline: Pipeline, cluster: Cluster) -> dict[str, Any]:
    """Do one driver's run of a pipeline in a process of its own."""
    stores = pipeline.stores()
    statements = {name: store.job_statements() for name, store in stores.items()}
    settings = next(iter(pipeline.specs.values())).settings
    pool = SimulatedPool(cluster, statements, settings, pipeline.targets)
    return drive(store_of(stores), pool, pipeline.recipes, cluster)


def drive(
    store: JobStore, pool: SimulatedPool, recipes: Mapping[str, Recipe], cluster: Cluster
) -> dict[str, Any]:
    statements: Counter[str] = Counter()
    sa.event.listen(
        sa.Engine, "before_cursor_execute", lambda *_: statements.update([threading.current_thread().name])
    )
    began, cpu = time.monotonic(), time.thread_time()
    policy = Policy(max_calls=cluster.keys, suppress_errors=True, grace_seconds=0)
    driver = Driver(RunContext(store, pool, recipes, policy, "simulated"))
    driver.run(lambda status: status.made < cluster.steady_keys)
    wall = time.monotonic() - began
    return {
        "driver's CPU share": round((time.thread_time() - cpu) / wall, 2),
        "driver's share not waiting": round(1 - pool.waited_seconds / wall, 2),
        "driver's statements a second": round(sum(statements.values()) / wall),
    } | {name: round(figure, 3) for name, figure in asdict(pool.usage()).items()}
