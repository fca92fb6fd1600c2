"""What djdist wants to reach, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

DATABASES = {"mysql": "MariaDB", "postgresql": "PostgreSQL"}
THROUGHPUT = "jobs per second"
STATEMENTS = "statements per key by workers"
START = "seconds to the first make() on Ray"
SHORT_CALL = "seconds of populate(processes=2) of 4 keys"
ALL_NEW = "refreshed new keys per second"
NOTHING_NEW = "seconds of a refresh with nothing new, 100,000 jobs"
ONE_PERCENT_NEW = "seconds of a refresh with 1 % new, 1,000,000 keys"
ROUND = "milliseconds to add the jobs of 100 keys just made upstream, by rows there"
RESERVE = "milliseconds to reserve 100 by pending keys"
MEMORY = "driver's MB beyond its start, 1,000,000 pending"
IDLE = "share of 32 Ray workers' time between keys of 100 ms"
DRIVERS = "jobs per second by drivers of one table"
ROUND_TRIPS = "jobs per second by milliseconds of a round trip to the server"
SHARED = "local, shared transactions"
FAR = ("bare make", "native", "local", SHARED)
"""Who is measured far from the server."""
MAKESPAN = "makespan of whole pipelines, by what it takes at least"
PIPELINES = tuple(
    f"{tables} tables, {lengths} keys" for lengths in ("equal", "heavy-tailed") for tables in (3, 10, 30)
)
FIRST_LEAF = "time to the first key without descendants, by what it takes at least"
DRIVERS_OF_NAPS = "jobs per second by drivers of one table, make() of 100 ms"


@dataclass(frozen=True)
class Goal:
    """A figure worked out of what one benchmark noted of one database."""

    what: str
    topic: str
    figure: Callable[[Any], float]
    at_least: str
    aim: str = ""


def ratio(name: str, other: str) -> Callable[[Any], float]:
    """Compare two figures, or each round's two and take the median, since a machine's speed drifts."""
    return lambda figures: float(np.median(np.divide(figures.get(name, np.nan), figures[other])))


def of_pipelines(figures: dict[str, dict[str, dict[str, list[float]]]], name: str, pipeline: str) -> float:
    """Return the median of what a contestant took for a kind of pipeline, on one database or on all."""
    return float(np.median([each[pipeline][name] for each in figures.values() if name in each[pipeline]]))


def far_from(ms: str) -> Callable[[Any], float]:
    """Compare shared transactions with bare ones at so long a round trip."""
    return lambda rates: ratio(SHARED, "bare make")({name: of[ms] for name, of in rates.items()})


def worst(pipeline: str) -> Callable[[Any], float]:
    """Take the executor on which one run of a kind of pipeline took longest."""
    return lambda figures: max(float(np.median(figures[pipeline][name])) for name in ("local", "ray", "dask"))


def growth(times: dict[str, float]) -> float:
    return times["1000000"] / times["10000"]


def kept(rates: dict[str, float]) -> float:
    return rates["32"] / rates["4"]


GOALS = (
    Goal("local: jobs/s of bare make", THROUGHPUT, ratio("local", "bare make"), "0.85", "0.92"),
    Goal("local: jobs/s of native", THROUGHPUT, ratio("local", "native"), "2.5"),
    Goal("Ray: jobs/s of bare make", THROUGHPUT, ratio("ray", "bare make"), "0.8", "0.95"),
    Goal("Ray: jobs/s of native", THROUGHPUT, ratio("ray", "native"), "2"),
    Goal("Dask: jobs/s of bare make", THROUGHPUT, ratio("dask", "bare make"), "0.8", "0.88"),
    Goal("Dask: jobs/s of native", THROUGHPUT, ratio("dask", "native"), "2"),
    Goal("shared transactions: jobs/s of bare make", THROUGHPUT, ratio(SHARED, "bare make"), "1.4", "2"),
    Goal(
        "shared transactions, server 5 ms away: jobs/s of bare make",
        ROUND_TRIPS,
        far_from("5"),
        "1.7",
        "1.9",
    ),
    Goal(
        "shared transactions: statements a key beyond the two of make()",
        STATEMENTS,
        lambda f: float(f[SHARED]["1"] - 2),
        "0.2",
        "0.1",
    ),
    Goal("statements a key, 1 worker", STATEMENTS, lambda f: float(f["local"]["1"]), "6.1", "5.1"),
    Goal("statements a key, 32 workers", STATEMENTS, lambda f: float(f["local"]["32"]), "6.1", "5.1"),
    Goal(
        "32 drivers, trivial make(): jobs/s of 4 drivers",
        DRIVERS,
        lambda figures: kept(figures["djdist"]),
        "1",
    ),
    Goal(
        "32 drivers, trivial make(): what is kept of 4 drivers' jobs/s, of what bare make keeps",
        DRIVERS,
        lambda figures: kept(figures["djdist"]) / kept(figures["bare make"]),
        "",
        "1",
    ),
    Goal("32 drivers, 100 ms: jobs/s of 4 drivers", DRIVERS_OF_NAPS, kept, "1", "8"),
    Goal("refresh, all new: keys/s of native", ALL_NEW, ratio("djdist", "native"), "50"),
    Goal("refresh, all new: keys/s of bare", ALL_NEW, ratio("djdist", "bare"), "", "0.8"),
    Goal("refresh, nothing new: time of native", NOTHING_NEW, ratio("djdist", "native"), "1"),
    Goal("refresh, 1 % new: time of bare", ONE_PERCENT_NEW, ratio("djdist", "bare"), "2", "1.2"),
    Goal("round of 100 new keys, 1,000,000 of 10,000 rows: growth", ROUND, growth, "2"),
    Goal(
        "reserve, 1,000,000 of 10,000: growth of bare's growth",
        RESERVE,
        lambda figures: growth(figures["djdist"]) / growth(figures["bare"]),
        "1.2",
    ),
    Goal(
        "first make() on Ray: seconds beyond a task's",
        START,
        lambda figures: float(figures["populate()"] - figures["a task that connects"]),
        "0.6",
        "0.3",
    ),
    Goal(
        "populate(processes=2), first call: time of native",
        SHORT_CALL,
        ratio("first call", "native"),
        "2",
        "1.3",
    ),
    Goal(
        "populate(processes=2), later call: time of native",
        SHORT_CALL,
        ratio("later call", "native"),
        "2",
        "1.3",
    ),
    *(
        Goal(f"{pipeline}: makespan by its lower bound", MAKESPAN, worst(pipeline), "1.1", "1.05")
        for pipeline in PIPELINES
    ),
    *(
        Goal(f"{pipeline}: first leaf by the shortest way", FIRST_LEAF, worst(pipeline), "1.5")
        for pipeline in PIPELINES
    ),
    Goal("driver's memory, 1,000,000 pending: MB beyond its start", MEMORY, float, "200", "100"),
    Goal(
        "32 Ray workers, 100 ms: share of time between keys",
        IDLE,
        lambda figures: float(figures["idle share"]),
        "0.05",
        "0.02",
    ),
)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Set what was measured beside the goals."""
    rows = [
        {
            "": goal.what,
            **{name: _measured(goal, results.get(goal.topic, {}), key) for key, name in DATABASES.items()},
            "at least": goal.at_least,
            "aim": goal.aim,
        }
        for goal in GOALS
    ]
    return str(pd.DataFrame(rows).to_string(index=False))


def _measured(goal: Goal, by_database: dict[str, Any], database: str) -> str:
    with suppress(KeyError):  # it hasn't been measured
        return f"{goal.figure(by_database[database]):.2f}"
    return ""
