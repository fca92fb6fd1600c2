"""What docs/explanation/performance.md says of the benchmarks' figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import charts, goals

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "performance.md"
NUMBER = r"\d[\d,]*(?:\.\d+)?"


def row(what: str, figures: list[float], digits: int = 0) -> str:
    cells = ["–" if np.isnan(figure) else f"{figure:,.{digits}f}" for figure in figures]
    return f"| {what} | {' | '.join(cells)} |"


@dataclass(frozen=True)
class Figures:
    """The results as the page writes them."""

    results: dict[str, Any]

    def by_database(self, what: str, topic: str, name: str, digits: int = 0) -> str:
        known = [self.results.get(topic, {}).get(database, {}) for database in goals.DATABASES]
        return row(what, [figures.get(name, np.nan) for figures in known], digits)

    def rates(self, what: str, contestant: str) -> str:
        known = [self.results[goals.THROUGHPUT][database] for database in goals.DATABASES]
        rounds = [figures.get(contestant, [np.nan]) for figures in known]
        return row(what, [round(float(np.median(of_one)), -1) for of_one in rounds])

    def simulated(self, what: str, cluster: str) -> str:
        figures: list[float] = []
        for database in goals.DATABASES:
            drivers = self.results["simulated clusters"].get(f"{database}, {cluster}")
            figures += (
                [np.nan, np.nan]
                if drivers is None
                else [
                    100 * float(np.mean([driver["busy_share"] for driver in drivers])),
                    round(sum(driver["keys_per_second"] for driver in drivers), -1),
                ]
            )
        return row(what, figures)

    def saturated(self, what: str, drivers: str) -> str:
        figures = [
            self.results["drivers that never wait"][f"{database}, {drivers}"] for database in goals.DATABASES
        ]
        return row(what, [round(each["jobs per second"], -2) for each in figures])

    def rows(self) -> Iterator[str]:
        yield self.rates("bare `make()` in two processes", "bare make")
        yield self.rates("native populate in two processes", "native")
        yield self.rates("djdist, `processes=2`", "local")
        yield self.rates("djdist on Ray", "ray")
        yield self.rates("djdist on Dask", "dask")
        yield self.rates("djdist, `processes=2`, shared transactions", "local, shared transactions")
        yield self.rates("djdist on Ray, shared transactions", "ray, shared transactions")
        yield self.rates("djdist on Dask, shared transactions", "dask, shared transactions")
        statements = self.results[goals.STATEMENTS]["mysql"]
        for name, of_whom in (
            ("native workers", "native workers"),
            ("djdist, `processes=`", "local"),
            ("djdist, `processes=`, shared transactions", goals.SHARED),
        ):
            counts = statements.get(of_whom, {})
            yield row(name, [counts.get(workers, np.nan) for workers in ("1", "2", "8", "32")], 1)
        for keys in ("10000", "100000", "1000000"):
            times = [self.results[goals.RESERVE][database]["djdist"][keys] for database in goals.DATABASES]
            yield row(f"reserve 100 of {int(keys):,}, ms", times, 1)
        yield self.by_database("native refresh, new keys per second", goals.ALL_NEW, "native")
        yield self.by_database("djdist's refresh, new keys per second", goals.ALL_NEW, "djdist")
        yield self.by_database("refresh with nothing new, 100,000 jobs, s", goals.NOTHING_NEW, "djdist", 2)
        for rows in ("10000", "1000000"):
            yield self.by_database(
                f"jobs of 100 keys just made upstream, of {int(rows):,}, ms", goals.ROUND, rows, 1
            )
        yield self.by_database("a task of Ray's that connects, s", goals.START, "a task that connects", 1)
        yield self.by_database("`populate()`, s", goals.START, "populate()", 1)
        yield self.by_database("native `populate(processes=2)`, s", goals.SHORT_CALL, "native", 2)
        yield self.by_database("djdist's, first call of a session, s", goals.SHORT_CALL, "first call", 2)
        yield self.by_database("djdist's, a later call, s", goals.SHORT_CALL, "later call", 2)
        yield self.simulated("1,000 slots, keys of 1 s", "1,000 slots, 1 s")
        yield self.simulated(
            "the same, a node dies every 2 s", "1,000 slots, 1 s, Pareto, a node dies every 2 s"
        )
        yield self.simulated("10,000 slots, keys of 20 s", "10,000 slots, 20 s")
        yield self.simulated("10,000 slots, keys of 1 s", "10,000 slots, 1 s, 1 driver")
        yield self.simulated("10,000 slots, keys of 1 s, 2 drivers", "10,000 slots, 1 s, 2 drivers")
        yield self.simulated("10,000 slots, 30 tables, keys of 20 s", "10,000 slots, 30 tables, 20 s")
        yield self.saturated("1 driver, 1,000 in flight", "1 drivers, 1,000 in flight each")
        yield self.saturated("1 driver, 10,000 in flight", "1 drivers, 10,000 in flight each")
        yield self.saturated("2 drivers, 10,000 in flight each", "2 drivers, 10,000 in flight each")

        if self._is_known(goals.MAKESPAN):
            yield from self.pipelines()
        if self._is_known(goals.ROUND_TRIPS):
            yield from self.round_trips()

    def _is_known(self, topic: str) -> bool:
        return set(goals.DATABASES) <= set(self.results.get(topic, {}))

    def pipelines(self) -> Iterator[str]:
        for topic, what, digits in ((goals.MAKESPAN, "", 2), (goals.FIRST_LEAF, "first leaf: ", 1)):
            for contestant, (label, _) in charts.PIPELINES.items():
                figures = [
                    goals.of_pipelines(self.results[topic], contestant, kind) for kind in goals.PIPELINES
                ]
                yield row(f"{what}{label}", figures, digits)

    def round_trips(self) -> Iterator[str]:
        for database, name in goals.DATABASES.items():
            for contestant, rates in self.results[goals.ROUND_TRIPS][database].items():
                medians = [float(np.median(rounds or [np.nan])) for rounds in rates.values()]
                yield row(f"{name}: {contestant}", medians)

    def sentences(self) -> Iterator[str]:
        memory = max(self.results[goals.MEMORY].values())
        yield f"A million pending keys cost a driver {memory:.0f} MB"
        idle = max(figures["idle share"] for figures in self.results[goals.IDLE].values())
        yield f"spent {idle:.0%} of their time between keys".replace("%", " %")


def renew(results: dict[str, Any]) -> None:
    """Write the figures into the page in place of older ones."""
    page = PAGE.read_text()
    for row in Figures(results).rows():
        label = row[: row.index("|", 1)]
        page = re.sub(f"^{re.escape(label)}\\|.*$", row, page, flags=re.MULTILINE)
    for sentence in Figures(results).sentences():
        words = re.sub(NUMBER, NUMBER.replace("\\", r"\\"), re.escape(sentence)).replace(r"\ ", r"\s+")
        if sentence not in " ".join(page.splitlines()):
            page = re.sub(words, sentence, page)
    PAGE.write_text(page)
