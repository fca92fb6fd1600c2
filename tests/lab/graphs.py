"""Pipelines that only pretend: tables in a graph, keys that come of others, and a cluster with a clock."""

from __future__ import annotations

import heapq
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from itertools import count
from typing import Any, TypeVar

from djdist._job import (
    Breakage,
    BreakageKind,
    Completion,
    Ending,
    Failure,
    Job,
    Outcome,
    Policy,
    Recipe,
    Report,
    Summary,
)
from djdist._job_store import JobStore
from djdist._needs import ONE_CPU, Needs, Node
from djdist._task_pool import TaskPool
from djdist.driver import Driver, RunContext
from djdist.job_stores.pipeline import PipelineStore
from lab.scripted import Clock

Result = TypeVar("Result")
Keys = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class FakeTable:
    """A table of a pipeline that pretends: it has a key for each one that all its parents have.

    ``fan_out`` is how many keys come of one of its parents', ``follows`` whether new ones are found by it,
    ``after`` which tables its keys may be made from as a whole.
    """

    name: str
    parents: tuple[str, ...] = ()
    fan_out: int = 1
    follows: bool = True
    needs: Needs | None = ONE_CPU
    after: tuple[str, ...] = ()


class FakePipeline:
    """Tables, those upstream first, and what has been made of them.

    Parameters
    ----------
    tables : sequence of FakeTable
        The tables.
    keys : int
        How many keys a table without parents has.
    """

    def __init__(self, tables: Sequence[FakeTable], keys: int) -> None:
        self.tables = {table.name: table for table in tables}
        self.keys = keys
        self.lock = threading.RLock()  # a driver refreshes in a thread
        self.made: dict[str, set[Keys]] = {name: set() for name in self.tables}
        self.attributes: dict[str, tuple[str, ...]] = {}
        for table in tables:
            above = [name for parent in table.parents for name in self.attributes[parent]] or ["n"]
            own = [f"of_{table.name}"] if table.fan_out > 1 else []
            self.attributes[table.name] = tuple(dict.fromkeys([*above, *own]))

    def of_parent(self, parent: str, key: Keys) -> Keys:
        """Return the key of a parent from which a key comes."""
        given = dict(key)
        return tuple((name, given[name]) for name in self.attributes[parent])

    def key_source(self, name: str, among: Mapping[str, set[Keys]] | None = None) -> set[Keys]:
        """Return the keys that a table could have by now, those only that come of some parents' keys."""
        table = self.tables[name]
        joined: list[dict[str, int]] = [{}] if table.parents else [{"n": n} for n in range(self.keys)]
        for parent in table.parents:
            joined = _joined(joined, (among or {}).get(parent, self.made[parent]))
        own = [{f"of_{name}": n} for n in range(table.fan_out)] if table.fan_out > 1 else [{}]
        return {
            tuple((attribute, (key | more)[attribute]) for attribute in self.attributes[name])
            for key in joined
            for more in own
        }

    def recipes(self) -> dict[str, Recipe]:
        """Return how the tables are made."""
        return {
            name: Recipe(
                name,
                needs=table.needs,
                upstream=table.parents,
                follows=frozenset(table.parents if table.follows else ()),
                after=table.after,
            )
            for name, table in self.tables.items()
        }

    def store(self) -> PipelineStore:
        """Return the jobs of all tables."""
        return PipelineStore({name: FakeStore(self, name) for name in self.tables})


def _joined(rows: list[dict[str, int]], keys: set[Keys]) -> list[dict[str, int]]:
    """Join rows with keys by the attributes that they share."""
    first = dict(next(iter(keys), ()))
    shared = [name for name in first if rows and name in rows[0]]
    by_shared = defaultdict[tuple[int, ...], list[dict[str, int]]](list)
    for key in map(dict, keys):
        by_shared[tuple(key[name] for name in shared)].append(key)
    return [row | key for row in rows for key in by_shared[tuple(row[name] for name in shared)]]


def locked(act: Callable[..., Result]) -> Callable[..., Result]:
    """Do it while no other thread changes what the pipeline has."""

    @wraps(act)
    def alone(self: FakeStore, *arguments: Any, **options: Any) -> Result:
        with self.pipeline.lock:
            return act(self, *arguments, **options)

    return alone


class FakeStore(JobStore):
    """The jobs of one table of a pipeline that pretends."""

    def __init__(self, pipeline: FakePipeline, table: str) -> None:
        self.pipeline, self.table = pipeline, table
        self.waiting: dict[Keys, int] = {}
        self.owned: dict[Keys, int] = {}
        self.failed: set[Keys] = set()
        self.priorities: Callable[[Keys], int] = lambda key: 5
        self.asked = Counter[str]()
        self.notes: list[str] = []
        self.elsewhere = 0

    @locked
    def refresh(self) -> dict[str, int]:
        self.asked["refresh"] += 1
        return {"added": self._add(self.pipeline.key_source(self.table))}

    @locked
    def add_new(self, parents: Sequence[Job]) -> int | None:
        self.asked["add_new"] += 1
        new = defaultdict[str, set[Keys]](set)
        for job in parents:
            new[job.table].add(tuple(job.key.items()))
        added = 0
        for parent, keys in new.items():
            added += self._add(self.pipeline.key_source(self.table, {parent: keys}))
        return added

    def _add(self, keys: Iterable[Keys]) -> int:
        known = (self.pipeline.made[self.table], self.failed, self.waiting, self.owned)
        new = [key for key in keys if not any(key in each for each in known)]
        self.waiting |= {key: self.priorities(key) for key in new}
        return len(new)

    @locked
    def reserve(self, limit: int, max_priority: int | None = None) -> list[Job]:
        self.asked["reserve"] += 1
        due = [k for k, p in self.waiting.items() if max_priority is None or p <= max_priority]
        urgent = sorted(due, key=lambda key: self.waiting[key])[:limit]
        self.owned |= {key: self.waiting.pop(key) for key in urgent}
        return [Job(self.table, dict(key)) for key in urgent]

    @locked
    def next_priority(self) -> int | None:
        self.asked["next_priority"] += 1
        return min(self.waiting.values(), default=None)

    @locked
    def reserved(self) -> list[Job]:
        return [Job(self.table, dict(key)) for key in self.owned]

    @locked
    def release(self, jobs: Sequence[Job], *, delay_seconds: float = 0) -> int:
        keys = [tuple(job.key.items()) for job in jobs]
        self.waiting = {key: self.owned.pop(key) for key in keys} | self.waiting
        return len(jobs)

    def release_waiting(self, jobs: Sequence[Job]) -> list[Job]:
        return []

    def release_all(self) -> None:
        self.release(self.reserved())

    @locked
    def fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> bool:
        self.failed.add(tuple(job.key.items()))
        del self.owned[tuple(job.key.items())]
        return True

    def note(self, jobs: Sequence[Job], text: str) -> None:
        self.notes += [text] * len(jobs)

    @locked
    def forget(self, job: Job) -> None:
        del self.owned[tuple(job.key.items())]

    def renew(self, jobs: Sequence[Job]) -> list[Job]:
        return list(jobs)

    def rescue(self) -> int:
        return 0

    def begun(self, jobs: Sequence[Job]) -> list[Job]:
        return list(jobs) if len(jobs) == 1 else []  # a cluster that pretends makes all of a group

    def handed_back(self, jobs: Sequence[Job]) -> bool:
        return False

    def begun_by(self, host: str, pid: int) -> list[Job]:
        return []

    def held_by_others(self) -> int:
        return self.elsewhere

    @locked
    def pending(self, most: int | None = None) -> int:
        return len(self.waiting) if most is None else min(most, len(self.waiting))


@dataclass
class FakeCluster(TaskPool):
    """Nodes on which keys take their time by a clock, which goes on while the driver waits.

    ``seconds`` says how long a key takes, ``ending`` how it ends, ``needs_of`` what a table says that a
    key needs, None where it raises.
    """

    pipeline: FakePipeline
    machines: Sequence[Node]
    clock: Clock
    seconds: Callable[[Job], float] = lambda job: 1.0
    ending: Callable[[Job], Ending | BreakageKind] = lambda job: Ending.MADE
    needs_of: Callable[[Job], Needs | None] = lambda job: ONE_CPU
    began: dict[tuple[str, Keys], float] = field(default_factory=dict)
    given: dict[tuple[str, Keys], Needs] = field(default_factory=dict)
    begun: list[Job] = field(default_factory=list)
    busy_seconds: float = 0.0
    peak_memory: int = 0
    ended_at: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tickets = count(1)
        self._waiting: dict[int, tuple[tuple[Job, ...], Needs]] = {}
        self._running: list[tuple[float, int]] = []
        self._at: dict[int, tuple[tuple[Job, ...], Needs, int, float]] = {}
        self._free = [dict(node.amounts) for node in self.machines]
        self._slots = [float("inf") if node.slots is None else node.slots for node in self.machines]
        self._trials: list[int] = []
        self._asked: dict[int, tuple[Job, ...]] = {}

    def nodes(self) -> Sequence[Node]:
        return self.machines

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        ticket = next(self._tickets)
        if jobs:
            self._waiting[ticket] = tuple(jobs), needs
            if jobs[0].asks:
                self._asked[ticket] = tuple(jobs)
                del self._waiting[ticket]
            self._begin()
        else:
            self._trials.append(ticket)
        return ticket

    def _begin(self) -> None:
        for ticket, (jobs, needs) in list(self._waiting.items()):
            for number, free in enumerate(self._free):
                if self._slots[number] and all(free.get(n, 0) >= a - 1e-9 for n, a in needs.amounts.items()):
                    del self._waiting[ticket]
                    self._occupy(number, needs, -1)
                    seconds = sum(map(self.seconds, jobs))
                    self.busy_seconds += seconds
                    self.begun += jobs
                    self.given |= {(job.table, tuple(job.key.items())): needs for job in jobs}
                    self.began |= {(job.table, tuple(job.key.items())): self.clock.seconds for job in jobs}
                    heapq.heappush(self._running, (self.clock.seconds + seconds, ticket))
                    self._at[ticket] = jobs, needs, number, seconds
                    break

    def _occupy(self, number: int, needs: Needs, sign: int) -> None:
        self._slots[number] += sign
        for name, amount in needs.amounts.items():
            self._free[number][name] += sign * amount

    def wait(self, timeout_seconds: float) -> list[Completion]:
        if self._trials:
            trials, self._trials = self._trials, []
            return [Completion(ticket, Report()) for ticket in trials]
        if self._asked:
            asked, self._asked = self._asked, {}
            return [self._answer(ticket, jobs) for ticket, jobs in asked.items()]
        until = self.clock.seconds + timeout_seconds
        if self._running and self._running[0][0] <= until:
            self.clock.seconds = max(self.clock.seconds, self._running[0][0])
        elif self._running:
            self.clock.seconds = until
        ended = []
        while self._running and self._running[0][0] <= self.clock.seconds:
            _, ticket = heapq.heappop(self._running)
            ended.append(self._completion(ticket))
        self._begin()
        return ended

    def _answer(self, ticket: int, jobs: Sequence[Job]) -> Completion:
        answers = [(Job(job.table, job.key), self.needs_of(job)) for job in jobs]
        size_unknown = Failure("LookupError: size unknown")
        outcomes = tuple(Outcome(job, Ending.FAILED, size_unknown) for job, said in answers if said is None)
        return Completion(ticket, Report(outcomes, needs=tuple((job, n) for job, n in answers if n)))

    def _completion(self, ticket: int) -> Completion:
        jobs, needs, number, seconds = self._at.pop(ticket)
        self._occupy(number, needs, 1)
        endings = [self.ending(job) for job in jobs]
        for job, ending in zip(jobs, endings, strict=True):
            if ending is Ending.MADE:
                with self.pipeline.lock:
                    self.pipeline.made[job.table].add(tuple(job.key.items()))
            self.ended_at[job.table] = self.clock.seconds
        for ending in endings:
            if isinstance(ending, BreakageKind):
                return Completion(ticket, error=Breakage(ending, ending.value))
        outcomes = [
            Outcome(job, ending, None if ending is Ending.MADE else Failure("ValueError: no"))
            for job, ending in zip(jobs, endings, strict=True)
            if isinstance(ending, Ending)
        ]
        return Completion(ticket, Report(tuple(outcomes), seconds=seconds, peak_memory=self.peak_memory))

    def cancel(self, ticket: int) -> bool:
        return self._waiting.pop(ticket, None) is not None

    def kill(self, ticket: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._waiting.clear()
        self._running.clear()


def slots(number: int) -> list[Node]:
    """Return one node with so many processors."""
    return [Node({"cpus": number})]


def run(cluster: FakeCluster, policy: Policy | None = None, store: PipelineStore | None = None) -> Summary:
    """Make a whole pipeline on a cluster."""
    return driver_of(cluster, policy, store).run(lambda status: True)


def driver_of(
    cluster: FakeCluster, policy: Policy | None = None, store: PipelineStore | None = None
) -> Driver:
    """Return the driver of a run of a whole pipeline."""
    pipeline = cluster.pipeline
    policy = policy or Policy(suppress_errors=True)
    context = RunContext(
        store or pipeline.store(),
        cluster,
        pipeline.recipes(),
        policy,
        "pipeline",
        clock=cluster.clock,
        sleep=cluster.clock.sleep,
    )
    return Driver(context)


def lower_bound(pipeline: FakePipeline, slots: int, seconds: Callable[[Job], float]) -> float:
    """Return the time that no scheduler can do without: the work by the slots, or the longest way."""
    whole = FakePipeline(list(pipeline.tables.values()), pipeline.keys)
    ways: dict[tuple[str, Keys], float] = {}
    work = 0.0
    for name, table in whole.tables.items():
        whole.made[name] = whole.key_source(name)
        for key in whole.made[name]:
            took = seconds(Job(name, dict(key)))
            work += took
            before = [ways[parent, whole.of_parent(parent, key)] for parent in table.parents]
            ways[name, key] = took + max(before, default=0.0)
    return max(work / slots, *ways.values())
