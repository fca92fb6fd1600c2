"""How long a refresh takes, beside the bare INSERT … SELECT and native refresh."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import datajoint as dj
import pytest

import djdist
from benchmarks.conftest import Record
from benchmarks.goals import ALL_NEW, NOTHING_NEW, ONE_PERCENT_NEW, ROUND, growth
from benchmarks.many_keys import add_numbers, bare_refresh, empty_jobs, seconds, update_statistics
from djdist._job import Job
from djdist.job_stores.jobs_table.refreshing import Refreshing
from djdist.job_stores.jobs_table.store import JobsTable
from djdist.jobs.table import jobs_of
from djdist.pipeline.jobs_table import jobs_table_spec_of
from djdist.pipeline.plan import plan_of
from servers import Server

pytestmark = pytest.mark.timeout(1800)

ROUNDS = 3
NEW, NEW_TO_NATIVE = 100_000, 5_000
MANY, ONE_PERCENT = 1_000_000, 10_000
ROUND_OF = 100


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    djdist.enable()
    yield
    djdist.disable()


def test_all_keys_are_new(server: Server, lab: ModuleType, record: Record) -> None:
    add_numbers(lab, NEW)
    native = dj.Job(lab.Doubled())
    rates: dict[str, list[float]] = {"bare": [], "native": [], "djdist": []}
    for _ in range(ROUNDS):
        empty_jobs(lab)
        rates["bare"].append(NEW / seconds(lambda: bare_refresh(lab)))
        empty_jobs(lab)
        rates["native"].append(NEW_TO_NATIVE / seconds(lambda: native.refresh(f"n < {NEW_TO_NATIVE}")))
        empty_jobs(lab)
        rates["djdist"].append(NEW / seconds(lab.Doubled.jobs.refresh))
    medians = {name: round(statistics.median(each)) for name, each in rates.items()}
    record(ALL_NEW, server.backend, medians)
    of_bare, of_native = medians["djdist"] / medians["bare"], medians["djdist"] / medians["native"]
    print(f"{server.backend}: {medians} new keys/s, {of_bare:.2f} of bare, {of_native:.0f} x native")


def test_nothing_is_new(server: Server, lab: ModuleType, record: Record) -> None:
    add_numbers(lab, NEW)
    lab.Doubled.jobs.refresh()
    native = dj.Job(lab.Doubled())
    times: dict[str, list[float]] = {"native": [], "djdist": []}
    for _ in range(3 * ROUNDS):
        times["native"].append(seconds(native.refresh))
        times["djdist"].append(seconds(lab.Doubled.jobs.refresh))
    _report(NOTHING_NEW, times, server, record)


def test_one_percent_is_new(server: Server, lab: ModuleType, record: Record) -> None:
    add_numbers(lab, MANY)
    lab.Doubled.jobs.refresh()
    times: dict[str, list[float]] = {"bare": [], "djdist": []}
    for round_ in range(ROUNDS):
        first = MANY + 2 * round_ * ONE_PERCENT
        add_numbers(lab, ONE_PERCENT, first)
        times["bare"].append(seconds(lambda: bare_refresh(lab)))
        add_numbers(lab, ONE_PERCENT, first + ONE_PERCENT)
        times["djdist"].append(seconds(lab.Doubled.jobs.refresh))
    _report(ONE_PERCENT_NEW, times, server, record)


def test_keys_just_made_upstream(server: Server, lab: ModuleType, record: Record) -> None:
    """What a round of a run of several tables costs follows the keys, not the tables."""
    plan, jobs = plan_of([lab.Doubled, lab.Quadrupled]), jobs_of(lab.Quadrupled())
    spec = jobs_table_spec_of(plan, plan["Quadrupled"], jobs)
    store, rows, medians = JobsTable(spec, refreshing=Refreshing(priority=5)), 0, dict[str, float]()
    query, doubled = lab.Number.connection.query, lab.Doubled().full_table_name
    for size in (10_000, MANY):
        add_numbers(lab, size - rows, rows)
        query(
            f"INSERT INTO {doubled} (n, y) SELECT n, x FROM {lab.Number().full_table_name} WHERE n >= {rows}"
        )
        update_statistics(lab.Doubled())
        store.refresh()
        rows, times = size, list[float]()
        for first in range(0, size, size // (3 * ROUNDS)):
            query(f"DELETE FROM {jobs.full_table_name} WHERE n >= {first} AND n < {first + ROUND_OF}")
            made = [Job("Doubled", {"n": n}) for n in range(first, min(size, first + ROUND_OF))]
            times.append(1000 * seconds(partial(store.add_new, made)))
        medians[str(size)] = round(statistics.median(times), 2)
    store.close()
    record(ROUND, server.backend, medians)
    print(f"{server.backend}: {ROUND}: {medians}, ratio {growth(medians):.2f}")


def _report(topic: str, times: dict[str, list[float]], server: Server, record: Record) -> None:
    medians = {name: round(statistics.median(each), 3) for name, each in times.items()}
    record(topic, server.backend, medians)
    ratios = [f"{medians['djdist'] / medians[name]:.2f} of {name}" for name in medians if name != "djdist"]
    print(f"{server.backend}: {topic}: {medians}, {', '.join(ratios)}")
