"""Pipelines of many tables, whose keys sleep for as long as was drawn for each beforehand."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

SLOTS = 8
SECONDS = 64.0
"""What all keys of a pipeline take, by the slots."""
KEYS = {3: 160, 10: 64, 30: 24}
"""Of each table, by the number of tables."""
LENGTHS: dict[str, Callable[[random.Random], float]] = {
    "equal": lambda chance: 1.0,
    # half of the keys take less than two thirds of the mean, one in thirty takes four times as long
    "heavy-tailed": lambda chance: min(10.0, chance.paretovariate(1.5)),
}
HEAD = '''
import time

import datajoint as dj

schema = dj.Schema("{schema}")


@schema
class Cold(dj.Manual):
    definition = """
    n : int32
    """


@schema
class Warm(dj.Computed):
    definition = """
    -> Cold
    """

    def make(self, key):
        time.sleep(0.1)
        self.insert1(key)


@schema
class Source(dj.Manual):
    definition = """
    n : int32
    ---
    {columns}
    """
'''
TABLE = '''

@schema
class {name}(dj.Computed):
    definition = """
    {parents}
    ---
    began : float64
    ended : float64
    """

    def make(self, key):
        began = time.time()
        time.sleep((Source & key).fetch1("{column}"))
        self.insert1({{**key, "began": began, "ended": time.time()}})
'''


@dataclass(frozen=True)
class Pipeline:
    """Tables in a graph with forks and joins, each with a key for each of the source, and what keys take.

    Parameters
    ----------
    tables : int
        How many there are.
    lengths : {"equal", "heavy-tailed"}
        How long keys take.
    seed : int, optional
        Draws the graph and the lengths.
    """

    tables: int
    lengths: str
    seed: int = 0

    @cached_property
    def parents(self) -> dict[str, list[str]]:
        """Of each table, those upstream first."""
        chance, parents = random.Random(f"graph {self.tables} {self.seed}"), dict[str, list[str]]()
        for number in range(self.tables):
            near = list(parents)[-4:]
            parents[f"T{number}"] = sorted(chance.sample(near, min(len(near), chance.choice([1, 1, 2]))))
        return parents

    @cached_property
    def seconds(self) -> dict[str, list[float]]:
        """What the keys of each table take."""
        chance = random.Random(f"lengths {self.tables} {self.seed}")
        drawn = {
            name: [LENGTHS[self.lengths](chance) for _ in range(KEYS[self.tables])] for name in self.parents
        }
        unit = SLOTS * SECONDS / sum(map(sum, drawn.values()))
        return {name: [length * unit for length in lengths] for name, lengths in drawn.items()}

    @cached_property
    def soonest(self) -> dict[str, list[float]]:
        """When the keys of each table could be there if each had a slot of its own."""
        soonest = dict[str, list[float]]()
        for name, parents in self.parents.items():
            above = [soonest[parent] for parent in parents] or [[0.0] * KEYS[self.tables]]
            soonest[name] = [max(b) + own for *b, own in zip(*above, self.seconds[name], strict=True)]
        return soonest

    @property
    def leaves(self) -> set[str]:
        """The tables that no other comes of."""
        return self.parents.keys() - {parent for parents in self.parents.values() for parent in parents}

    @property
    def lower_bound_seconds(self) -> float:
        """What no scheduler can do without: the work by the slots, or the longest way."""
        work = sum(map(sum, self.seconds.values()))
        return max(work / SLOTS, *(max(each) for each in self.soonest.values()))

    @property
    def first_leaf_seconds(self) -> float:
        """When the first key that no other comes of could be there."""
        return min(min(self.soonest[name]) for name in self.leaves)

    def scheduled(self) -> tuple[float, float]:
        """Return the makespan and when a first leaf is there, where nothing costs time but keys.

        Whoever schedules it knows the graph, but not what keys take, as in reality: of what could run, it
        takes what is nearest to a leaf.
        """
        children = {name: [c for c, ps in self.parents.items() if name in ps] for name in self.parents}
        steps = dict[str, int]()
        for name in reversed(list(self.parents)):
            steps[name] = 1 + min((steps[child] for child in children[name]), default=-1)
        missing = {(name, n): len(ps) for name, ps in self.parents.items() for n in range(KEYS[self.tables])}
        ready = [(steps[name], n, name) for (name, n), parents in missing.items() if not parents]
        now, first_leaf, running = 0.0, float("inf"), list[tuple[float, int, str]]()
        while ready or running:
            while ready and len(running) < SLOTS:
                _, n, name = heapq.heappop(ready)
                heapq.heappush(running, (now + self.seconds[name][n], n, name))
            now, n, name = heapq.heappop(running)
            first_leaf = min(first_leaf, now) if name in self.leaves else first_leaf
            for child in children[name]:
                missing[child, n] -= 1
                if not missing[child, n]:
                    heapq.heappush(ready, (steps[child], n, child))
        return now, first_leaf

    def code(self, schema: str) -> str:
        """Return the module that declares it."""
        columns = "\n    ".join(f"{name.lower()} : float64" for name in self.parents)
        return "".join([HEAD.format(schema=schema, columns=columns), *self._tables()])

    def _tables(self) -> Iterator[str]:
        for name, parents in self.parents.items():
            lines = "\n    ".join(f"-> {parent}" for parent in parents or ["Source"])
            yield TABLE.format(name=name, parents=lines, column=name.lower())
        yield f"\nTABLES = [{', '.join(self.parents)}]\n"

    def times(self, module: ModuleType) -> tuple[float, float]:
        """Return the makespan and when a first leaf was there, by what the rows say of themselves."""
        rows = {name: getattr(module, name)().to_arrays("began", "ended") for name in self.parents}
        assert all(len(ended) == KEYS[self.tables] for _, ended in rows.values())
        began = min(each.min() for each, _ in rows.values())
        ends = {name: ended for name, (_, ended) in rows.items()}
        first_leaf = min(ends[name].min() for name in self.leaves)
        return float(max(each.max() for each in ends.values()) - began), float(first_leaf - began)

    def fill(self, module: ModuleType, warm_up: int) -> None:
        """Insert the source's keys with what each table takes for them, and those to warm workers up."""
        module.Cold.insert({"n": n} for n in range(warm_up))
        columns = {name.lower(): lengths for name, lengths in self.seconds.items()}
        module.Source.insert(
            {"n": n, **{column: lengths[n] for column, lengths in columns.items()}}
            for n in range(KEYS[self.tables])
        )
