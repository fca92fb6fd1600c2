"""The tables of a run: what each may still give, how its keys are grouped, and which goes first."""

import heapq
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from djdist._job import Policy, Recipe
from djdist._job_store import JobStore
from djdist.driver.backlog import Backlog
from djdist.driver.counting import Counting
from djdist.driver.grouping import Grouping
from djdist.errors import DatabaseError

PRIORITY_SECONDS = 1.0
"""After this time another run or a user may have added something more urgent; where all tables are empty, a
run that watches looks no more often than for new keys."""


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

    Attributes
    ----------
    is_held : bool
        None of its keys may begin yet.
    is_refused : bool
        Its database has refused it when it was last asked.
    priority : int or None
        That of its most urgent job when it was last looked up, None where none was due.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: JobStore,
        depth: int,
        task_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.recipe = recipe
        self.name = recipe.table
        self.store = store
        self.depth = depth
        self.is_held = bool(recipe.after)
        self.is_refused = False
        self.backlog = Backlog(store, clock)
        self.grouping = Grouping(task_seconds)
        self.priority: int | None = None

    def found_priority(self, priority: int | None) -> None:
        """Note the priority of its most urgent job."""
        self.priority, self.backlog.is_refilled, self.is_refused = priority, False, False
        if priority is None:
            self.backlog.found_short()


Rank = tuple[int, int]
"""The smaller goes first."""

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
        self._store, self._clock, self._looked_at = store, clock, float("-inf")
        self._tables = {
            name: TableJobs(recipe, store.of(name), depth, policy.task_seconds, clock)
            for depth, (name, recipe) in enumerate(recipes.items())
        }
        self._poll_seconds = policy.poll_seconds or 0.0
        self._ranks = _ranks(recipes, downstream_first=policy.order == "downstream")
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
        """Reserve the most urgent jobs first, at the same priority those of the table whose rank is first.

        A table of which nothing is in flight is asked until it has been seen empty.
        """
        alone = len(self) == 1
        if not alone:
            self._look_up_priorities(tolerated)
        idle = {t.name for t in self if not in_flight.get(t.name) and (alone or not t.backlog.empty)}
        asked = [t for t in self if not t.is_held and t.backlog.may_have_more(idle=t.name in idle)]
        if alone:
            for table in asked:
                fill_from(table, None)
            return
        urgent: list[tuple[int, Rank, str]] = []
        for table in asked:
            self._push(urgent, table)
        while urgent:
            table = self._tables[heapq.heappop(urgent)[-1]]
            max_priority = urgent[0][0] if urgent else None
            if fill_from(table, max_priority) and max_priority is not None:
                with tolerated(table):
                    table.found_priority(table.store.next_priority())
                    self._push(urgent, table)
        for table in asked:
            if table.name in idle and table.backlog.ran_short and not table.backlog.empty:
                fill_from(table, None)  # it tells that nothing is left, also of a commit without an answer

    def _look_up_priorities(self, tolerated: Tolerated) -> None:
        """Ask for all tables at once what is due, where something was added, or once in a while."""
        is_new = any(table.backlog.is_refilled for table in self)
        pause_seconds = max(PRIORITY_SECONDS, self._poll_seconds if self.empty else 0)
        if not is_new and self._clock() - self._looked_at < pause_seconds:
            return
        self._looked_at = self._clock()
        try:
            priorities = self._store.next_priorities()
        except DatabaseError:  # maybe of one table only
            for table in self:
                table.priority = None
                with tolerated(table):
                    table.found_priority(table.store.next_priority())
            return
        for table in self:
            table.found_priority(priorities.get(table.name))

    def _push(self, urgent: list[tuple[int, Rank, str]], table: TableJobs) -> None:
        if table.priority is not None:
            heapq.heappush(urgent, (table.priority, self._ranks[table.name], table.name))

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
        return {table.name: table.store.pending() for table in self if not table.backlog.empty}


def _ranks(recipes: Mapping[str, Recipe], *, downstream_first: bool) -> dict[str, Rank]:
    """Return which tables go first: those nearest to a last table, so that results finish early.

    Else those with the longest way to one, so that no long chain is left for the end.
    """
    below: dict[str, list[str]] = {name: [] for name in recipes}
    for name, recipe in recipes.items():
        for parent in {*recipe.upstream, *recipe.after} & recipes.keys():
            below[parent].append(name)
    chosen, sign = (min, 1) if downstream_first else (max, -1)
    ways = dict[str, int]()
    for name in reversed([*recipes]):
        ways[name] = 1 + chosen((ways[each] for each in below[name]), default=0)
    return {name: (sign * ways[name], -sign * depth) for depth, name in enumerate(recipes)}
