from __future__ import annotations

import threading
from collections.abc import Sequence

from djdist._job import Job
from djdist.driver.lease import Lease
from djdist.driver.tasks import Task
from djdist.job_stores.memory import MemoryStore
from lab.watching import wait_until


class WatchedStore(MemoryStore):
    """Notes what is renewed; what is lost is not the run's any more."""

    def __init__(self, count: int) -> None:
        super().__init__("Square", ({"n": number} for number in range(count)))
        self.renewed: list[int] = []
        self.rescues = 0
        self.lost: set[int] = set()
        self.away = False

    def renew(self, jobs: Sequence[Job]) -> list[Job]:
        if self.away:
            raise ConnectionError("the database is away")
        self.renewed.append(len(jobs))
        return [job for job in super().renew(jobs) if job.key["n"] not in self.lost]

    def rescue(self) -> int:
        self.rescues += 1
        return 0


def lease(store: WatchedStore, tasks: list[Task], seconds: float) -> Lease:
    return Lease(store, tasks, seconds, threading.Event())


def test_all_in_flight_are_renewed_and_the_dead_ones_rescued_while_the_run_is_busy() -> None:
    store = WatchedStore(5)
    with lease(store, [Task(1, tuple(store.reserve(3)), 0)], seconds=0.2):
        while len(store.renewed) < 3:
            sum(range(1000))  # a busy loop in the driver's thread
    assert set(store.renewed) == {3}
    assert store.rescues >= 2


def test_a_task_is_lost_that_is_missing_twice() -> None:
    store = WatchedStore(2)
    kept, lost = tasks = [Task(n, (job,), 0) for n, job in enumerate(store.reserve(2))]
    store.lost = {1}
    with lease(store, tasks, seconds=0.04):
        wait_until(lambda: lost.is_lost, "the second renewal")
    assert kept.misses == 0
    assert len(store.renewed) >= 2


def test_a_database_that_is_away_is_tried_again() -> None:
    store = WatchedStore(1)
    store.away = True
    with lease(store, [Task(1, tuple(store.reserve(1)), 0)], seconds=0.04):
        store.away = False
        wait_until(lambda: store.renewed, "a renewal")
