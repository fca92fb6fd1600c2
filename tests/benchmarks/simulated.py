"""A cluster of thousands of slots that only pretends to make keys.

Real are the driver, its job store, the database and the clock, and what workers do to the jobs table:
they begin the jobs of a group together and delete each one that is made, in its moment, but with one
statement for all workers that do so with keys of the same table in the same hundredth of a second. Of a
pipeline they also insert the table's row, of which the keys of others come. A worker begins no more keys of
its group once it has been busy for ``GROUP_SECONDS``, as real ones do. No ``make()`` runs: a slot is
busy for as long as a heavy-tailed distribution says. Nothing travels over a network. The cluster is a
process of its own, so that its work is none of the driver's.
"""

from __future__ import annotations

import heapq
import math
import multiprocessing
import random
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from types import MappingProxyType, ModuleType
from typing import Any

from benchmarks.many_keys import add_numbers
from djdist._job import GROUP_SECONDS, Breakage, BreakageKind, Completion, Ending, Job, Key, Outcome, Report
from djdist._needs import Needs, Node
from djdist._task_pool import TaskPool
from djdist.database.dbapi import ConnectionSettings
from djdist.database.job_statements import JobStatements, key_name
from djdist.job_stores.jobs_table.refreshing import Refreshing
from djdist.job_stores.jobs_table.store import JobsTable
from djdist.jobs.table import jobs_of
from djdist.pipeline.jobs_table import jobs_table_spec
from djdist.pipeline.jobs_table_spec import JobsTableSpec
from djdist.shipping.packing import open_dbapi_connection
from djdist.worker.session import Session

NODE_SLOTS = 50
"""So many die together."""
BACK_SECONDS = 3.0
SIGMA = 1.5
"""Of the logarithm: half of the keys take less than a third of the mean, one in a hundred ten times it."""
PARETO = 1.5
"""Its exponent: the variance has no bound."""
LONGEST = 30
"""Times the mean."""
TICK_SECONDS = 0.01
BATCH = 500
WORKER = {"worker_host": "simulated", "worker_pid": 1}


def fill(lab: ModuleType, keys: int) -> JobsTableSpec:
    """Let so many jobs wait."""
    add_numbers(lab, keys)
    spec = jobs_table_spec(jobs_of(lab.Doubled()))
    JobsTable(spec, refreshing=Refreshing(priority=5)).refresh()
    return spec


@dataclass(frozen=True)
class Cluster:
    """What a simulated cluster is like, and how many keys it will get."""

    slots: int
    mean_seconds: float
    keys: int
    death_every_seconds: float = math.inf
    lengths: str = "lognormal"

    @property
    def steady_keys(self) -> float:
        """So many have begun when keys become scarce."""
        return self.keys - 1.25 * self.slots


@dataclass(frozen=True)
class Usage:
    """What slots did from when all had got a key until keys became scarce."""

    busy_share: float
    keys_per_second: float


class SimulatedPool(TaskPool):
    """Hands tasks to a simulated cluster.

    Parameters
    ----------
    cluster : Cluster
        What it is like.
    statements : mapping of str to JobStatements
        What workers do to the jobs of each table.
    settings : ConnectionSettings
        Their way to the database.
    targets : mapping of str to str, optional
        The full names of the tables into which they insert a row for each key.
    """

    def __init__(
        self,
        cluster: Cluster,
        statements: Mapping[str, JobStatements],
        settings: ConnectionSettings,
        targets: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.waited_seconds = 0.0
        self._slots = cluster.slots
        self._nodes: list[Node] = []
        self._in_flight: dict[int, tuple[Job, ...]] = {}
        self._trials: list[int] = []
        self._unsent: list[tuple[int, str, list[Key]]] = []
        self._submitted = 0
        self._line, far_end = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_simulate, args=(far_end, cluster, statements, settings, dict(targets)), daemon=True
        )
        self._process.start()

    def nodes(self) -> Sequence[Node]:
        if len(self._nodes) * NODE_SLOTS != self._slots:
            self._nodes = [Node({"cpus": NODE_SLOTS})] * (self._slots // NODE_SLOTS)
        return self._nodes

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        self._submitted += 1
        if jobs:
            self._in_flight[self._submitted] = tuple(jobs)
            self._unsent.append((self._submitted, table, [job.key for job in jobs]))
        else:
            self._trials.append(self._submitted)
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        if self._trials:
            return [Completion(self._trials.pop(), Report())]
        if self._unsent:
            self._line.send(self._unsent)
            self._unsent = []
        began = time.monotonic()
        self._line.poll(timeout_seconds)
        self.waited_seconds += time.monotonic() - began
        ended: list[tuple[int, int, float]] = []
        while self._line.poll():
            self._slots, several = self._line.recv()
            ended += several
        return [self._completion(*each) for each in ended]

    def cancel(self, ticket: int) -> bool:
        return False

    def kill(self, ticket: int) -> None:
        """No job is taken over here."""

    def close(self) -> None:
        """The cluster is there until it has told its usage."""

    def usage(self) -> Usage:
        self._line.send(None)
        usage = next(message for message in iter(self._line.recv, None) if isinstance(message, Usage))
        self._process.join()
        return usage

    def _completion(self, ticket: int, made: int, seconds: float) -> Completion:
        jobs = self._in_flight.pop(ticket)
        if not seconds:
            return Completion(ticket, error=Breakage(BreakageKind.NODE_LOST, "the node died"))
        endings = [Ending.MADE] * made + [Ending.NOT_STARTED] * (len(jobs) - made)
        return Completion(ticket, Report(tuple(map(Outcome, jobs, endings)), seconds=seconds))


class EagerPool(TaskPool):
    """Ends a tenth of its tasks whenever it is asked: it shows what a driver can do at most."""

    waits_for_room = False

    def __init__(self, slots: int) -> None:
        self.began_at = self.ended_at = 0.0
        self._slots = slots
        self._nodes = [Node({"cpus": slots})]
        self._in_flight: dict[int, tuple[Job, ...]] = {}
        self._submitted = 0

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        if jobs:
            self.began_at = self.began_at or time.monotonic()
        self._submitted += 1
        self._in_flight[self._submitted] = tuple(jobs)
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        self.ended_at = time.monotonic()
        oldest = list(islice(self._in_flight, max(1, self._slots // 10)))
        return [_all_made(ticket, self._in_flight.pop(ticket)) for ticket in oldest]

    def cancel(self, ticket: int) -> bool:
        return False

    def kill(self, ticket: int) -> None:
        """No job is taken over here."""

    def close(self) -> None:
        """Nothing runs."""


def _all_made(ticket: int, jobs: Sequence[Job]) -> Completion:
    """Tell that each took a second, so that no keys are grouped."""
    return Completion(ticket, Report(tuple(Outcome(job, Ending.MADE) for job in jobs), seconds=len(jobs)))


@dataclass(eq=False)
class _Task:
    ticket: int
    table: str
    keys: list[Key]
    made: int = 0
    began_at: float = 0.0


class _Simulation:
    def __init__(
        self,
        line: Connection,
        cluster: Cluster,
        statements: Mapping[str, JobStatements],
        settings: ConnectionSettings,
        targets: Mapping[str, str],
    ) -> None:
        self._line = line
        self._cluster = cluster
        self._statements, self._targets = statements, targets
        self._session = Session(open_dbapi_connection(settings))
        self._chance = random.Random(7)
        self._waiting = deque[_Task]()
        self._running = list[tuple[float, int, _Task]]()
        self._back_at = deque[float]()
        self._now = time.monotonic()
        self._dies_at = self._next_death()
        self._begun = self._counted_keys = 0
        self._busy_seconds = self._slot_seconds = self._counted_seconds = 0.0

    def run(self) -> Usage:
        while self._receive():
            passed_seconds, self._now = time.monotonic() - self._now, time.monotonic()
            self._count(passed_seconds)
            if ended := self._die() + self._end():
                self._line.send((self._slots, ended))
            self._begin()
        return Usage(self._busy_seconds / self._slot_seconds, self._counted_keys / self._counted_seconds)

    @property
    def _slots(self) -> int:
        return self._cluster.slots - NODE_SLOTS * len(self._back_at)

    @property
    def _is_steady(self) -> bool:
        return self._cluster.slots <= self._begun <= self._cluster.steady_keys

    def _receive(self) -> bool:
        """Take in tasks for a moment; False when the driver has had enough."""
        until = self._now + TICK_SECONDS
        while self._line.poll(max(0.0, until - time.monotonic())):
            tasks = self._line.recv()
            if tasks is None:
                return False
            self._waiting += [_Task(*task) for task in tasks]
        return True

    def _count(self, passed_seconds: float) -> None:
        if self._is_steady:
            self._busy_seconds += passed_seconds * len(self._running)
            self._slot_seconds += passed_seconds * self._slots
            self._counted_seconds += passed_seconds

    def _begin(self) -> None:
        free = max(0, self._slots - len(self._running))
        begun = [self._waiting.popleft() for _ in range(min(len(self._waiting), free))]
        for table, batch in _batches((task.table, key) for task in begun for key in task.keys):
            self._statements[table].begins(self._session, batch)
        for task in begun:
            task.began_at = self._now
            self._make_next(task)
            self._begun += len(task.keys)

    def _make_next(self, task: _Task) -> None:
        heapq.heappush(self._running, (self._now + self._draw(), task.ticket, task))

    def _draw(self) -> float:
        mean = self._cluster.mean_seconds
        if self._cluster.lengths == "Pareto":
            return min(self._chance.paretovariate(PARETO) * mean * (PARETO - 1) / PARETO, LONGEST * mean)
        return min(self._chance.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA), LONGEST * mean)

    def _end(self) -> list[tuple[int, int, float]]:
        made, ended = list[tuple[str, Key]](), list[tuple[int, int, float]]()
        while self._running and self._running[0][0] <= self._now:
            _, ticket, task = heapq.heappop(self._running)
            made.append((task.table, task.keys[task.made]))
            task.made += 1
            seconds = self._now - task.began_at
            if task.made < len(task.keys) and seconds <= GROUP_SECONDS:
                self._make_next(task)
            else:
                ended.append((ticket, task.made, seconds))
        for table, batch in _batches(made):
            self._finish(table, batch)
        if self._is_steady:
            self._counted_keys += len(made)
        return ended

    def _finish(self, table: str, jobs: list[dict[str, Any]]) -> None:
        statements = self._statements[table]
        if table in self._targets:
            keys = [statements.key.arguments(values) for values in jobs]
            rows = ", ".join([f"({', '.join(['%s'] * len(keys[0]))})"] * len(keys))
            insert = f"INSERT INTO {self._targets[table]} VALUES {rows}"
            self._session.execute(insert, [value for values in keys for value in values])
        statements._execute(self._session, statements.finish, jobs)

    def _die(self) -> list[tuple[int, int, float]]:
        while self._back_at and self._back_at[0] <= self._now:
            self._back_at.popleft()
        if self._now < self._dies_at:
            return []
        self._dies_at = self._next_death()
        self._back_at.append(self._now + BACK_SECONDS)
        dead = self._chance.sample(self._running, min(NODE_SLOTS, len(self._running)))
        tickets = {ticket for _, ticket, _ in dead}
        self._running = [each for each in self._running if each[1] not in tickets]
        heapq.heapify(self._running)
        return [(ticket, 0, 0.0) for ticket in tickets]

    def _next_death(self) -> float:
        mean = self._cluster.death_every_seconds
        return math.inf if mean == math.inf else self._now + self._chance.expovariate(1 / mean)


def _values(key: Key) -> dict[str, Any]:
    return {**WORKER, **{key_name(name): value for name, value in key.items()}}


def _batches(jobs: Iterable[tuple[str, Key]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    by_table = defaultdict[str, list[dict[str, Any]]](list)
    for table, key in jobs:
        by_table[table].append(_values(key))
    for table, values in by_table.items():
        yield from ((table, values[first : first + BATCH]) for first in range(0, len(values), BATCH))


def _simulate(line: Connection, *how: Any) -> None:
    line.send(_Simulation(line, *how).run())
