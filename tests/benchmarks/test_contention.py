"""How fast trivial keys are made by many drivers of one table, beside as many processes of bare make()."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.conftest import Record
from benchmarks.contestants import BARE, PREAMBLE, WARM_UP, empty, jobs_per_second
from benchmarks.goals import DRIVERS
from servers import Server

pytestmark = pytest.mark.timeout(1800)

KEYS = 6_400 + WARM_UP
ROUNDS = 3
COUNTS = (1, 4, 32)
DRIVERS_SCRIPT = """
import multiprocessing
import djdist

djdist.enable()

def drive(start):
    Doubled.connection.connect()
    Doubled.populate("n < {warm_up}", reserve_jobs=True, max_calls=2)
    start.wait()
    Doubled.populate(reserve_jobs=True)

processes = multiprocessing.get_context("fork")
start = processes.Barrier({workers})
drivers = [processes.Process(target=drive, args=(start,)) for _ in range({workers})]
for driver in drivers:
    driver.start()
for driver in drivers:
    driver.join()
"""
SCRIPTS = {"djdist": DRIVERS_SCRIPT, "bare make": BARE}


def test_drivers_share_a_table(server: Server, lab: ModuleType, tmp_path: Path, record: Record) -> None:
    lab.Number.insert({"n": n, "x": n} for n in range(KEYS))
    rates: dict[tuple[str, int], list[float]] = {(name, count): [] for name in SCRIPTS for count in COUNTS}
    for _ in range(ROUNDS):
        for (name, count), measured in rates.items():
            empty(lab)
            script = tmp_path / "shared.py"
            script.write_text(
                PREAMBLE.format(server=server, module=lab.__name__)
                + SCRIPTS[name].format(workers=count, warm_up=WARM_UP)
            )
            subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=True)
            assert len(lab.Doubled()) == KEYS
            measured.append(jobs_per_second(lab))
    medians = {name: {str(count): _median(rates[name, count]) for count in COUNTS} for name in SCRIPTS}
    record(DRIVERS, server.backend, medians)


def _median(rates: list[float]) -> int:
    return round(statistics.median(rates))
