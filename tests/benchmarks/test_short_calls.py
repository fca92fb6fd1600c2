"""How long a call takes that makes a handful of keys in two processes."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import ModuleType

from benchmarks.conftest import Record
from benchmarks.contestants import Bench, empty
from benchmarks.goals import SHORT_CALL
from servers import Server

KEYS = 4
ROUNDS = 5
CALLS = f"""
import time

def seconds(restriction):
    began = time.perf_counter()
    Doubled.populate(restriction, reserve_jobs=True, processes=2)
    return time.perf_counter() - began

print(*(seconds(f"n < {{count}}") for count in ({KEYS}, {2 * KEYS})))
"""
SCRIPTS = {"native": CALLS, "djdist": "import djdist\ndjdist.enable()\n" + CALLS}


def test_a_handful_of_keys_in_two_processes(
    server: Server, lab: ModuleType, tmp_path: Path, record: Record
) -> None:
    lab.Number.insert({"n": n, "x": n} for n in range(2 * KEYS))
    bench = Bench(server, lab.__name__, tmp_path, {})
    seconds: dict[str, list[float]] = {"native": [], "first call": [], "later call": []}
    for _ in range(ROUNDS):
        empty(lab)
        seconds["native"].append(float(bench.run(SCRIPTS["native"]).split()[0]))
        empty(lab)
        first, later = map(float, bench.run(SCRIPTS["djdist"]).split())
        assert len(lab.Doubled()) == 2 * KEYS
        seconds["first call"].append(first)
        seconds["later call"].append(later)
    medians = {name: round(statistics.median(each), 2) for name, each in seconds.items()}
    record(SHORT_CALL, server.backend, medians)
