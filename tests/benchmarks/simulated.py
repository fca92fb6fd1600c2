"""A cluster of thousands of places that only pretends to make keys.

Real are the driver, its job store, the database, and what workers do to the jobs table, though for
several groups at once: they begin jobs and delete those that are made. No ``make()`` runs: a place is
busy for a time from a lognormal distribution. The cluster is a process of its own, so that its work
is none of the driver's.
"""

from __future__ import annotations

import heapq
import math
import multiprocessing
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from djdist.executor import Executor, window
from djdist.fence import Fence, Statement, key_name
from djdist.grouping import GROUP_SECONDS
from djdist.job import Completion, Ending, Job, Outcome, Report, Work
from djdist.making import Session
from djdist.shipping import ConnectionSettings, open_dbapi_connection

NODE_PLACES = 50
"""So many die together."""
BACK_SECONDS = 3.0
SIGMA = 1.5
"""Of the logarithm: half of the keys take less than a third of the mean, one in a hundred ten times it."""
LONGEST = 15
"""Times the mean."""
TICK_SECONDS = 0.01
WORKER = {"worker_host": "simulated", "worker_pid": 1}


@dataclass(frozen=True)
class Cluster:
    """What a simulated cluster is like, and how many keys it will get."""

    places: int
    mean_seconds: float
    keys: int
    death_every_seconds: float = math.inf


@dataclass(frozen=True)
class End:
    """What became of a task; none of its keys is made if its node died."""

    ticket: int
    made: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Usage:
    """What places did from when all had got a key until keys became scarce."""

    busy_share: float
    keys_per_second: float


class SimulatedExecutor(Executor):
    """Hands tasks to a simulated cluster."""

    def __init__(self, cluster: Cluster, fence: Fence, settings: ConnectionSettings) -> None:
        self._places = cluster.places
        self._in_flight: dict[int, tuple[Job, ...]] = {}
        self._ended: list[End] = []
        self._submitted = 0
        self._line, far_end = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_simulate, args=(far_end, cluster, fence, settings), daemon=True
        )
        self._process.start()

    def start(self, work: Work) -> None:
        """Nothing to get ready."""

    def free_places(self) -> int:
        return window(self._places) - len(self._in_flight)

    def submit(self, name: str, jobs: Sequence[Job]) -> int:
        self._submitted += 1
        self._in_flight[self._submitted] = tuple(jobs)
        if jobs:
            self._line.send((self._submitted, [job.key for job in jobs]))
        else:
            self._ended.append(End(self._submitted))
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        ended, self._ended = self._ended, []
        while self._line.poll(0 if ended else timeout_seconds):
            self._places, several = self._line.recv()
            ended += several
        return [self._completion(end) for end in ended]

    def cancel(self, ticket: int) -> bool:
        return False

    def kill(self, ticket: int) -> None:
        """No job is taken over here."""

    def close(self) -> None:
        """The cluster is there until it has told its usage."""

    def usage(self) -> Usage:
        self._line.send(None)
        usage: Usage = self._line.recv()
        self._process.join()
        return usage

    def _completion(self, end: End) -> Completion:
        jobs = self._in_flight.pop(end.ticket)
        if jobs and not end.made:
            return Completion(end.ticket, breakage="the node died")
        made = tuple(Outcome(job, Ending.MADE) for job in jobs[: end.made])
        left = tuple(Outcome(job, Ending.LEFT) for job in jobs[end.made :])
        return Completion(end.ticket, Report(made + left, seconds=end.seconds))


@dataclass(eq=False)
class _Task:
    ticket: int
    values: list[dict[str, Any]]
    made: int = 0
    began: float = 0.0


class _Simulation:
    def __init__(
        self, line: Connection, cluster: Cluster, fence: Fence, settings: ConnectionSettings
    ) -> None:
        self._line = line
        self._cluster = cluster
        self._fence = fence
        self._session = Session(open_dbapi_connection(settings))
        self._chance = random.Random(7)
        self._mu = math.log(cluster.mean_seconds) - SIGMA**2 / 2
        self._waiting = deque[_Task]()
        self._running = list[tuple[float, int, _Task]]()
        self._back_at = deque[float]()
        self._now = time.monotonic()
        self._dies_at = self._next_death()
        self._made = self._counted_keys = 0
        self._busy_seconds = self._place_seconds = self._counted_seconds = 0.0

    def run(self) -> Usage:
        while self._receive():
            passed_seconds, self._now = time.monotonic() - self._now, time.monotonic()
            self._count(passed_seconds)
            ended = self._die() + self._end()
            if ended:
                self._line.send((self._places, ended))
            self._begin()
        return Usage(self._busy_seconds / self._place_seconds, self._counted_keys / self._counted_seconds)

    @property
    def _places(self) -> int:
        return self._cluster.places - NODE_PLACES * len(self._back_at)

    @property
    def _is_steady(self) -> bool:
        return self._cluster.places <= self._made <= self._cluster.keys - self._cluster.places

    def _receive(self) -> bool:
        """Take in tasks for a moment; False when the driver has had enough."""
        timeout_seconds = TICK_SECONDS
        while self._line.poll(timeout_seconds):
            message = self._line.recv()
            if message is None:
                return False
            ticket, keys = message
            self._waiting.append(_Task(ticket, [_values(key) for key in keys]))
            timeout_seconds = 0.0
        return True

    def _count(self, passed_seconds: float) -> None:
        if self._is_steady:
            self._busy_seconds += passed_seconds * len(self._running)
            self._place_seconds += passed_seconds * self._places
            self._counted_seconds += passed_seconds

    def _begin(self) -> None:
        begun = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._free))]
        if not begun:
            return
        self._fence.begins(self._session, [values for task in begun for values in task.values])
        for task in begun:
            task.began = self._now
            self._run(task, self._now)

    def _draw(self) -> float:
        longest = LONGEST * self._cluster.mean_seconds
        return min(self._chance.lognormvariate(self._mu, SIGMA), longest)

    @property
    def _free(self) -> int:
        return max(0, self._places - len(self._running))

    def _run(self, task: _Task, now: float) -> None:
        heapq.heappush(self._running, (now + self._draw(), task.ticket, task))

    def _end(self) -> list[End]:
        ended, made = list[End](), list[dict[str, Any]]()
        while self._running and self._running[0][0] <= self._now:
            now, _, task = heapq.heappop(self._running)
            made.append(task.values[task.made])
            task.made += 1
            if task.made < len(task.values) and now - task.began <= GROUP_SECONDS:
                self._run(task, now)
            else:
                ended.append(End(task.ticket, task.made, now - task.began))
        if made:
            self._delete(made)
        return ended

    def _delete(self, jobs: list[dict[str, Any]]) -> None:
        finish, key = self._fence.finish, self._fence.key
        of_any = Statement(finish.sql.rpartition(f" AND {key.sql[1:-1]}")[0], finish.names[: -len(key.names)])
        self._fence._execute(self._session, of_any, jobs)
        self._made += len(jobs)
        if self._is_steady:
            self._counted_keys += len(jobs)

    def _die(self) -> list[End]:
        while self._back_at and self._back_at[0] <= self._now:
            self._back_at.popleft()
        if self._now < self._dies_at:
            return []
        self._dies_at = self._next_death()
        self._back_at.append(self._now + BACK_SECONDS)
        dead = self._chance.sample(self._running, min(NODE_PLACES, len(self._running)))
        self._running = [each for each in self._running if each not in dead]
        heapq.heapify(self._running)
        return [End(task.ticket) for _, _, task in dead]

    def _next_death(self) -> float:
        mean = self._cluster.death_every_seconds
        return math.inf if mean == math.inf else self._now + self._chance.expovariate(1 / mean)


def _values(key: dict[str, Any]) -> dict[str, Any]:
    return {**WORKER, **{key_name(name): value for name, value in key.items()}}


def _simulate(line: Connection, cluster: Cluster, fence: Fence, settings: ConnectionSettings) -> None:
    usage = _Simulation(line, cluster, fence, settings).run()
    line.send(usage)
