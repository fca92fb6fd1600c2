"""Fills what is free: reserves jobs and submits them as tasks."""

from collections.abc import Sequence
from functools import partial

from djdist._job import Job
from djdist._needs import ONE_CPU
from djdist.driver.key_needs import KeyNeeds
from djdist.driver.results import Results
from djdist.driver.room import Room
from djdist.driver.tables import TableJobs, Tables
from djdist.driver.tasks import InFlight
from djdist.driver.tolerance import Tolerance

MOST_AT_ONCE = 1000
"""So many jobs at most are reserved by one statement, unless there are more slots."""


class Filling:
    """Reserves as many jobs as there is room for, and submits them in groups that need the same.

    Parameters
    ----------
    tables : Tables
        Say which are the most urgent.
    tasks : InFlight
        Are added to.
    room : Room
        Says how many fit.
    needs : KeyNeeds
        Say what keys need.
    results : Results
        Say how many the run may still make.
    tolerance : Tolerance
        Says whether a database may refuse a table.
    """

    def __init__(
        self,
        tables: Tables,
        tasks: InFlight,
        room: Room,
        needs: KeyNeeds,
        results: Results,
        tolerance: Tolerance,
    ) -> None:
        self._tables = tables
        self._tasks = tasks
        self._room = room
        self._needs = needs
        self._results = results
        self._tolerance = tolerance

    def fill(self) -> None:
        """Reserve and submit what fits, the most urgent first."""
        if self._results.free_calls(1) <= 0:
            return
        needs = {table: self._needs.of_table(table.name) for table in self._tables if not table.is_held}
        self._room.expect(each for table, each in needs.items() if not table.backlog.empty)
        if self._tasks and not any(map(self._room.free, {*needs.values()})):
            return  # spares the store to be asked what is the most urgent
        self._tables.fill(self._fill_from, self._tasks.task_counts, self._tolerance.of)

    def _fill_from(self, table: TableJobs, max_priority: int | None) -> bool:
        """Reserve and submit what fits of one table; return whether it had some, and too few."""
        needs = self._needs.of_table(table.name)
        slots = self._room.free(needs)
        if slots <= 0 or self._results.free_calls(1) <= 0:
            return False
        size = table.grouping.size_of_shares(partial(self._left, table), self._room.slots(needs))
        most = max(slots, MOST_AT_ONCE)
        limit = self._results.free_calls(min(slots * size, most))
        idle, jobs = not self._tasks.task_counts[table.name], list[Job]()
        with self._tolerance.of(table):
            jobs = table.backlog.reserve(limit, idle=idle, max_priority=max_priority)
        reserved, jobs = len(jobs), self._tasks.not_in_flight(jobs)
        self._results.count_reserved(len(jobs))
        shares = 1 if reserved == most else slots  # no sign of little left where one statement gave its most
        unknown = table.grouping.split(list(filter(self._needs.has_to_ask, jobs)), size, shares)
        self._tasks.submit(((ONE_CPU, group) for group in unknown), asks=True)
        self.submit([job for job in jobs if not self._needs.has_to_ask(job)], size, shares)
        return 0 < reserved < limit

    def submit(self, jobs: Sequence[Job], size: int = 1, shares: int = 1) -> None:
        """Submit reserved jobs of which it is known what they need."""
        for needs, mine in self._needs.parted(jobs):
            groups = self._tables[mine[0].table].grouping.split(mine, size, shares)
            self._tasks.submit((needs, group) for group in groups)

    def isolate(self, jobs: Sequence[Job]) -> None:
        """Make each of these in a task of its own next, because one of them may have killed their worker."""
        for name in {job.table for job in jobs} if len(jobs) > 1 else ():
            self._tables[name].grouping.isolate([job for job in jobs if job.table == name])

    def slots(self) -> int:
        """Return how many tasks can run at the same time, where tables differ those of the smallest needs."""
        return max(self._room.slots(self._needs.of_table(table.name)) for table in self._tables)

    def _left(self, table: TableJobs, enough: int) -> int:
        """Count what is left of a table for this run, no further than to what is enough."""
        return self._results.free_calls(table.backlog.estimate(enough))
