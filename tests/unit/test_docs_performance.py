"""docs/explanation/performance.md has the figures of the last benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import goals

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "performance.md").read_text()
RESULTS: dict[str, Any] = json.loads((ROOT / "tests" / "benchmarks" / "results.json").read_text())
DATABASES = ("mysql", "postgresql")


def row(what: str, figures: list[float], digits: int = 0) -> str:
    return f"| {what} | {' | '.join(f'{figure:,.{digits}f}' for figure in figures)} |"


def by_database(what: str, topic: str, name: str, digits: int = 0) -> str:
    return row(what, [RESULTS[topic][database][name] for database in DATABASES], digits)


def rates(what: str, contestant: str) -> str:
    rounds = [RESULTS[goals.THROUGHPUT][database][contestant] for database in DATABASES]
    return row(what, [round(float(np.median(of_one)), -1) for of_one in rounds])


def simulated(what: str, cluster: str) -> str:
    figures: list[float] = []
    for database in DATABASES:
        drivers = RESULTS["simulated clusters"][f"{database}, {cluster}"]
        figures += [
            100 * float(np.mean([driver["busy_share"] for driver in drivers])),
            round(sum(driver["keys_per_second"] for driver in drivers), -1),
        ]
    return row(what, figures)


def saturated(what: str, drivers: str) -> str:
    figures = [RESULTS["drivers that never wait"][f"{database}, {drivers}"] for database in DATABASES]
    return row(what, [round(each["jobs per second"], -2) for each in figures])


def rows() -> Iterator[str]:
    yield rates("bare `make()` in two processes", "bare make")
    yield rates("native populate in two processes", "native")
    yield rates("djdist, `processes=2`", "local")
    yield rates("djdist on Ray", "ray")
    yield rates("djdist on Dask", "dask")
    statements = RESULTS[goals.STATEMENTS]["mysql"]
    for name, of_whom in (("native workers", "native workers"), ("djdist, `processes=`", "local")):
        yield row(name, [statements[of_whom][workers] for workers in ("1", "2", "8", "32")], 1)
    for keys in ("10000", "100000", "1000000"):
        times = [RESULTS[goals.RESERVE][database]["djdist"][keys] for database in DATABASES]
        yield row(f"reserve 100 of {int(keys):,}, ms", times, 1)
    yield by_database("native refresh, new keys per second", goals.ALL_NEW, "native")
    yield by_database("djdist's refresh, new keys per second", goals.ALL_NEW, "djdist")
    yield by_database("refresh with nothing new, 100,000 jobs, s", goals.NOTHING_NEW, "djdist", 2)
    for rows in ("10000", "1000000"):
        yield by_database(f"jobs of 100 keys just made upstream, of {int(rows):,}, ms", goals.ROUND, rows, 1)
    yield by_database("a task of Ray's that connects, s", goals.START, "a task that connects", 1)
    yield by_database("`populate()`, s", goals.START, "populate()", 1)
    yield simulated("1,000 slots, keys of 1 s", "1,000 slots, 1 s")
    yield simulated("the same, a node dies every 2 s", "1,000 slots, 1 s, Pareto, a node dies every 2 s")
    yield simulated("10,000 slots, keys of 20 s", "10,000 slots, 20 s")
    yield simulated("10,000 slots, keys of 1 s", "10,000 slots, 1 s, 1 driver")
    yield simulated("10,000 slots, keys of 1 s, 2 drivers", "10,000 slots, 1 s, 2 drivers")
    yield saturated("1 driver, 1,000 in flight", "1 drivers, 1,000 in flight each")
    yield saturated("1 driver, 10,000 in flight", "1 drivers, 10,000 in flight each")
    yield saturated("2 drivers, 10,000 in flight each", "2 drivers, 10,000 in flight each")


def sentences() -> Iterator[str]:
    memory = max(RESULTS[goals.MEMORY].values())
    yield f"A million pending keys cost a driver {memory:.0f} MB"
    idle = max(figures["idle share"] for figures in RESULTS[goals.IDLE].values())
    yield f"spent {idle:.0%} of their time between keys".replace("%", " %")


@pytest.mark.parametrize("line", [*rows(), *sentences()])
def test_it_has_the_figures_of_the_benchmark(line: str) -> None:
    assert line in " ".join(PAGE.splitlines()) or line in PAGE
