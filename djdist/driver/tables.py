"""The tables of a run: what each may still give, how its keys are grouped, and which goes first."""

import heapq
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from djdist._job import Policy, Recipe
from djdist._job_store import JobStore
from djdist.driver.backlog import WAIT_SECONDS, Backlog
from djdist.driver.counting import Counting
from djdist.driver.grouping import Grouping

PRIORITY_SECONDS = 1.0
"""After this time another run or a user may have added something more urgent."""
TABLES_AT_ONCE = 5
"""With more tables than this, each that had too little is asked again the later."""


class TableJobs:
    """One table of a run.

    Parameters
    ----------
    recipe : Recipe
        How its keys are made.
    store : JobStore
        Keeps its jobs.
    depth : int
        How many tables of the run come before it.
    task_seconds : float
        How long a task should take.
    again_seconds : float
        After this time it may have more than when it ran short.

    Attributes
    ----------
    is_held : bool
        None of its keys may begin yet.
    is_refused : bool
        Its database has refused it when it was last asked.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: JobStore,
        depth: int,
        task_seconds: float,
        again_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.recipe = recipe
        self.name = recipe.table
        self.store = store
        self.depth = depth
        self.is_held = bool(recipe.after)
        self.is_refused = False
        self.backlog = Backlog(store, clock, again_seconds)
        self.grouping = Grouping(task_seconds)
        self._clock = clock
        self._priority: int | None = None
        self._looked_at = float("-inf")

    def priority(self) -> int | None:
        """Return the priority of its most urgent job, which is looked up once in a while."""
        if self.backlog.is_refilled or self._clock() - self._looked_at >= PRIORITY_SECONDS:
            self.look_up_priority()
        return self._priority

    def look_up_priority(self) -> int | None:
        """Return the priority of its most urgent job now."""
        self._priority, self._looked_at = self.store.next_priority(), self._clock()
        self.backlog.is_refilled = False
        if self._priority is None:
            self.backlog.found_short()
        return self._priority


FillFrom = Callable[[TableJobs, int | None], bool]
"""Reserves what fits of a table, up to a priority; returns whether it had some, and too few."""

Tolerated = Callable[[TableJobs], AbstractContextManager[None]]
"""Says around what is done with a table's jobs whether its database may refuse that."""


class Tables:
    """All tables of a run, those upstream first.

    Parameters
    ----------
    recipes : mapping of str to Recipe
        How the keys of each are made, those upstream first.
    store : JobStore
        Keeps the jobs of all.
    policy : Policy
        Which go first at the same priority.
    """

    def __init__(
        self, recipes: Mapping[str, Recipe], store: JobStore, policy: Policy, clock: Callable[[], float]
    ) -> None:
        again_seconds = WAIT_SECONDS * max(1, len(recipes) / TABLES_AT_ONCE)
        self._tables = {
            name: TableJobs(recipe, store.of(name), depth, policy.task_seconds, again_seconds, clock)
            for depth, (name, recipe) in enumerate(recipes.items())
        }
        self._downstream_first = policy.order == "downstream"
        self._counting = Counting(self._count_all, clock)
        self.is_counted = False

    def __getitem__(self, name: str) -> TableJobs:
        return self._tables[name]

    def __iter__(self) -> Iterator[TableJobs]:
        return iter(self._tables.values())

    def __len__(self) -> int:
        return len(self._tables)

    @property
    def empty(self) -> bool:
        """Whether nothing is left to reserve."""
        return all(table.backlog.empty for table in self)

    @property
    def run_short(self) -> bool:
        """Whether all of them had less than they were asked for."""
        return all(table.backlog.ran_short or table.is_held for table in self)

    @property
    def pending(self) -> int:
        """What was left when it was last seen."""
        return sum(table.backlog.pending for table in self)

    def fill(self, fill_from: FillFrom, in_flight: Mapping[str, int], tolerated: Tolerated) -> None:
        """Reserve the most urgent jobs first, at the same priority those of the deepest table.

        A table of which nothing is in flight is asked until it has been seen empty.
        """
        alone, idle = len(self) == 1, {table.name for table in self if not in_flight.get(table.name)}
        asked = [
            table
            for table in self
            if not table.is_held
            and table.backlog.may_have_more(idle=table.name in idle and (alone or not table.backlog.empty))
        ]
        if alone:
            for table in asked:
                fill_from(table, None)
            return
        urgent: list[tuple[int, int, str]] = []
        for table in asked:
            with tolerated(table):
                self._push(urgent, table, table.priority())
                table.is_refused = False
        while urgent:
            table = self._tables[heapq.heappop(urgent)[-1]]
            max_priority = urgent[0][0] if urgent else None
            if fill_from(table, max_priority) and max_priority is not None:
                with tolerated(table):
                    self._push(urgent, table, table.look_up_priority())
        for table in asked:
            if table.name in idle and table.backlog.ran_short and not table.backlog.empty:
                fill_from(table, None)  # it tells that nothing is left, also of a commit without an answer

    def _push(self, urgent: list[tuple[int, int, str]], table: TableJobs, priority: int | None) -> None:
        if priority is not None:
            heapq.heappush(urgent, (priority, self._rank(table), table.name))

    def _rank(self, table: TableJobs) -> int:
        return -table.depth if self._downstream_first else table.depth

    def count(self, age_seconds: float) -> int:
        """Count what is left, unless that was done so shortly ago; a count that takes long is seen later."""
        if found := self._counting.found(age_seconds):
            self.is_counted = True
            for name, count in found.items():
                self._tables[name].backlog.found(count)
        return self.pending

    def count_in_the_end(self) -> None:
        """Count what others may go on with, unless a table was seen empty."""
        for table in self:
            table.backlog.count_in_the_end()

    def held_back(self) -> dict[str, dict[str, int]]:
        """Return by table how many of its keys the errors of which others keep from being made."""
        return {table.name: table.store.held_back() for table in self}

    def _count_all(self) -> dict[str, int]:
        return {table.name: table.store.pending() for table in self}
