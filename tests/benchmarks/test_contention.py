"""How fast many drivers of one table make keys, beside as many processes of bare make()."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.conftest import Record
from benchmarks.contestants import BARE, WARM_UP, Bench, empty, in_another_order, jobs_per_second
from benchmarks.goals import DRIVERS, DRIVERS_OF_NAPS
from benchmarks.many_keys import add_numbers
from servers import Server

pytestmark = pytest.mark.timeout(1800)

KEYS = 32_000 + WARM_UP
NAPS = 1_280 + WARM_UP
ROUNDS = 3
COUNTS = (1, 4, 32)
DRIVERS_SCRIPT = """
import multiprocessing
import djdist

djdist.enable()

def drive(start):
    {table}.connection.connect()
    {table}.populate("n < {warm_up}", reserve_jobs=True, max_calls=2)
    start.wait()
    {table}.populate(reserve_jobs=True)

processes = multiprocessing.get_context("fork")
start = processes.Barrier({workers})
drivers = [processes.Process(target=drive, args=(start,)) for _ in range({workers})]
for driver in drivers:
    driver.start()
for driver in drivers:
    driver.join()
"""
SCRIPTS = {"djdist": DRIVERS_SCRIPT, "bare make": BARE}


@pytest.fixture
def bench(server: Server, lab: ModuleType, tmp_path: Path) -> Bench:
    return Bench(server, lab.__name__, tmp_path, {})


def test_drivers_share_trivial_keys(server: Server, lab: ModuleType, bench: Bench, record: Record) -> None:
    add_numbers(lab, KEYS)
    rates: dict[tuple[str, int], list[float]] = {(name, count): [] for name in SCRIPTS for count in COUNTS}
    for number in range(ROUNDS):
        for name, count in in_another_order(number, rates):
            empty(lab)
            bench.run(SCRIPTS[name].format(table="Doubled", workers=count, warm_up=WARM_UP))
            assert len(lab.Doubled()) == KEYS
            rates[name, count].append(jobs_per_second(lab))
    medians = {name: {str(count): _median(rates[name, count]) for count in COUNTS} for name in SCRIPTS}
    record(DRIVERS, server.backend, medians)


def test_drivers_share_long_keys(server: Server, lab: ModuleType, bench: Bench, record: Record) -> None:
    """Tell the drivers' own contention from that for two cores, which keys that sleep leave free."""
    add_numbers(lab, NAPS)
    rates: dict[int, list[float]] = {count: [] for count in COUNTS[1:]}
    for number in range(ROUNDS):
        for count in in_another_order(number, rates):
            empty(lab)
            bench.run(DRIVERS_SCRIPT.format(table="Napped", workers=count, warm_up=WARM_UP))
            assert len(lab.Napped()) == NAPS
            rates[count].append(_naps_per_second(lab))
    record(DRIVERS_OF_NAPS, server.backend, {str(count): _median(rates[count]) for count in rates})


def _naps_per_second(lab: ModuleType) -> float:
    times = (lab.Napped & f"n >= {WARM_UP}").to_arrays("ended")
    return float((len(times) - 1) / (times.max() - times.min()))


def _median(rates: list[float]) -> int:
    return round(statistics.median(rates))
