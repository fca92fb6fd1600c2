"""How long a short call on a running Ray cluster takes until its first ``make()``."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import ModuleType

from benchmarks.conftest import Record
from benchmarks.contestants import Bench, empty
from benchmarks.goals import START
from servers import Server

KEYS = 4
ROUNDS = 5
"""So many are counted, after one for which a cluster has workers ready that it started for nobody."""
PREAMBLE = """
import ray, time

ray.init(log_to_driver=False, logging_level="ERROR")
"""
PLAIN = f"""{PREAMBLE}
settings = database.model_dump()

@ray.remote
def connect():
    import datajoint as dj

    for name, value in settings.items():
        setattr(dj.config.database, name, value)
    dj.conn()
    return time.time()

begun_at = time.time()
print(ray.get(connect.remote()) - begun_at)
"""
POPULATE = f"""{PREAMBLE}
import djdist

djdist.enable()
begun_at = time.time()
Doubled.populate(reserve_jobs=True, executor="ray")
print(Doubled.to_arrays("made_at").min() - begun_at)
"""
SCRIPTS = {"a task that connects": PLAIN, "populate()": POPULATE}


def test_the_first_make_on_a_running_cluster(
    server: Server, lab: ModuleType, tmp_path: Path, environments: dict[str, dict[str, str]], record: Record
) -> None:
    lab.Number.insert({"n": n, "x": n} for n in range(KEYS))
    bench = Bench(server, lab.__name__, tmp_path, environments["ray"])
    seconds: dict[str, list[float]] = {name: [] for name in SCRIPTS}
    for _ in range(1 + ROUNDS):
        for name, script in SCRIPTS.items():
            empty(lab)
            seconds[name].append(float(bench.run(script)))
    medians = {name: round(statistics.median(each[1:]), 2) for name, each in seconds.items()}
    record(START, server.backend, medians)
