"""Lets new keys in: those whose parents have just been made, and those that others brought about."""

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from djdist._job import Job, Policy
from djdist.driver.tables import TableJobs, Tables
from djdist.driver.tolerance import Tolerance
from djdist.errors import DatabaseError

logger = logging.getLogger(__package__)

ROUND_SECONDS = 1.0
"""While all slots are busy nobody waits for new keys, so that one statement a table and second will do."""
SHORT_SECONDS = 0.02
"""Most refreshes take less, and the loop waits no longer for one."""
ROUND_SHARE = 4
"""While slots are free, between two rounds passes this many times what one takes."""
WHOLE_SECONDS = 1.0
OTHERS_SECONDS = 5.0
"""What others have made upstream is seen after this time."""
WHOLE_SHARE = 33
"""Reading whole key sources takes up to 3 % of the time."""
MOST_PARENTS = 2000
"""More parents than that wait for the next round."""


class Streaming:
    """Adds the jobs of new keys while a run goes on.

    Keys that the run has made mark the tables downstream. A table that follows them gets its new
    keys by a statement that looks at nothing else. Another one, such as one with a ``key_source`` of its
    own, is refreshed as a whole, in a thread, as are all for what others have made; a run that has nothing
    left does that once more before it ends.

    Parameters
    ----------
    tables : Tables
        Those of the run.
    policy : Policy
        Whether and how often it looks for new keys by itself.
    tolerance : Tolerance
        Says whether a database may refuse a table.
    clock : callable
        Seconds that pass.
    """

    def __init__(
        self, tables: Tables, policy: Policy, tolerance: Tolerance, clock: Callable[[], float]
    ) -> None:
        self._tables = tables
        self._policy = policy
        self._tolerance = tolerance
        self._clock = clock
        self._below: dict[str, list[_Refresh]] = defaultdict(list)
        self._refreshes = [_Refresh(table, clock, self._period_seconds(table)) for table in tables]
        for refresh in self._refreshes:
            for name in {*refresh.table.recipe.upstream, *refresh.table.recipe.after}:
                self._below[name].append(refresh)
        self._is_active = len(tables) > 1 or policy.watches
        self._round_ended_at, self._round_took_seconds = float("-inf"), 0.0
        self._thread: threading.Thread | None = None
        self._waits_for_others = False
        self._asked_at, self._held = float("-inf"), dict[str, int]()

    def note_made(self, job: Job) -> None:
        """Note a key that is in its table now."""
        for refresh in self._below.get(job.table, ()):
            refresh.note_parent(job)

    def begin(self) -> None:
        """Refresh the tables as a whole, but for those whose key source others have to complete first."""
        for refresh in self._refreshes:
            if refresh.table.recipe.after:
                refresh.is_wanted = refresh.is_behind = True
            else:
                refresh.table.store.refresh()
                refresh.ended_at = self._clock()

    def add(self, in_flight: Mapping[str, int], *, has_room: bool) -> None:
        """Let new keys in, if it is time for it."""
        if not self._is_active:
            return
        self._end_thread()
        self._hold_back(in_flight)
        self._add_followed(has_room=has_room)
        self._begin_whole(only_due=True)

    def due_in_seconds(self, *, has_room: bool) -> float:
        """Return after which time the next keys are let in that follow what was made."""
        if not any(refresh.marked for refresh in self._free):
            return float("inf")
        pause_seconds = max(SHORT_SECONDS, ROUND_SHARE * self._round_took_seconds)
        pause_seconds = pause_seconds if has_room else max(ROUND_SECONDS, pause_seconds)
        return self._round_ended_at + pause_seconds - self._clock()

    def may_add(self) -> bool:
        """Return whether more keys may come, now that nothing of the run is in flight and nothing pending.

        Others who are alive may be at work upstream; it is said once for whom the run waits.
        """
        while self._begin_whole(only_due=False) and self._thread is None:  # most end at once
            pass
        is_at_work = self._thread is not None or any(refresh.marked for refresh in self._refreshes)
        return is_at_work or not self._tables.empty or self._others_work_upstream()

    def wait(self, seconds: float) -> bool:
        """Wait for a refresh that goes on, not longer than that; return whether there was one."""
        if self._thread is None:
            return False
        self._thread.join(seconds)
        self._end_thread()
        return True

    @property
    def _free(self) -> "list[_Refresh]":
        return [refresh for refresh in self._refreshes if not refresh.table.is_held]

    def _hold_back(self, in_flight: Mapping[str, int]) -> None:
        """Hold back the tables whose keys may be made from any row of others that aren't done yet."""
        done = set[str]()
        for refresh in self._refreshes:  # those upstream first
            table, recipe = refresh.table, refresh.table.recipe
            waits = table.is_held and self._others_hold(recipe.after)
            table.is_held = waits or not done.issuperset(recipe.after)
            is_busy = bool(in_flight.get(table.name) or refresh.marked or refresh.is_wanted)
            if not is_busy and table.backlog.empty and done.issuperset(recipe.upstream):
                done.add(table.name)

    def _others_hold(self, names: Iterable[str]) -> bool:
        """Return whether others are making keys of these tables, which is asked once in a while."""
        if self._clock() - self._asked_at >= WHOLE_SECONDS:
            self._asked_at = self._clock()
            self._held = {**self._held_by_others(self._below)}
        return not self._held.keys().isdisjoint(names)

    def _period_seconds(self, table: TableJobs) -> float | None:
        """Return how often a table is refreshed by itself, None for never."""
        if self._policy.poll_seconds is not None:
            return self._policy.poll_seconds
        return OTHERS_SECONDS if table.recipe.upstream else None

    def _add_followed(self, *, has_room: bool) -> None:
        if self.due_in_seconds(has_room=has_room) > 0:
            return
        began_at = self._clock()
        for refresh in self._free:
            with self._tolerance.of(refresh.table):
                refresh.add_followed()
        self._round_ended_at = self._clock()
        self._round_took_seconds = self._round_ended_at - began_at

    def _begin_whole(self, *, only_due: bool) -> bool:
        """Begin to refresh the table that has waited for it the longest; return whether there is one."""
        waiting = [r for r in self._free if (r.is_due if only_due else r.is_behind)]
        if self._thread is None and waiting:
            first = min(waiting, key=lambda refresh: refresh.ended_at)
            self._thread = threading.Thread(target=first.whole, name="djdist-refresh", daemon=True)
            self._thread.start()
            self.wait(SHORT_SECONDS)
        return bool(waiting)

    def _end_thread(self) -> None:
        if self._thread and not self._thread.is_alive():
            self._thread = None
            for refresh in self._refreshes:
                with self._tolerance.of(refresh.table):
                    refresh.let_in()

    def _held_by_others(self, names: Iterable[str]) -> dict[str, int]:
        held = dict[str, int]()
        for table in map(self._tables.__getitem__, names):
            with self._tolerance.of(table):
                held[table.name] = table.store.held_by_others()
        return {name: count for name, count in held.items() if count}

    def _others_work_upstream(self) -> bool:
        held = self._held_by_others(self._below)
        if held and not self._waits_for_others:
            what = ", ".join(f"{count} keys of {name}" for name, count in held.items())
            logger.info("Waiting for %s that others are making, for what comes after them", what)
        self._waits_for_others = bool(held)
        for name in held:
            for refresh in self._below[name]:
                refresh.is_behind = True
        return bool(held)


class _Refresh:
    """What one table has to be brought up to date with."""

    def __init__(self, table: TableJobs, clock: Callable[[], float], period_seconds: float | None) -> None:
        self.table = table
        self.marked: list[Job] = []
        self.is_wanted = False
        self.is_behind = False
        self.ended_at = float("-inf")
        self._took_seconds = 0.0
        self._period_seconds = period_seconds
        self._clock = clock
        self._added = 0
        self._error: Exception | None = None

    def note_parent(self, job: Job) -> None:
        self.is_behind = True
        if job.table in self.table.recipe.follows:
            self.marked.append(job)
        else:
            self.is_wanted = True

    @property
    def is_due(self) -> bool:
        """Whether it is time to refresh it as a whole."""
        since = self._clock() - self.ended_at
        if self.is_wanted and since >= max(WHOLE_SECONDS, WHOLE_SHARE * self._took_seconds):
            return True
        return self._period_seconds is not None and since >= max(
            self._period_seconds, WHOLE_SHARE * self._took_seconds
        )

    def add_followed(self) -> None:
        parents, self.marked = self.marked[:MOST_PARENTS], self.marked[MOST_PARENTS:]
        if not parents:
            return
        try:
            added = self.table.store.add_new(parents)
        except DatabaseError:
            self.is_wanted = True
            raise
        if added:
            self.table.backlog.returned(added)

    def whole(self) -> None:
        """Refresh it, in a thread."""
        began_at = self._clock()
        self.is_wanted = self.is_behind = False
        try:
            self._added = self.table.store.refresh().get("added", 0)
        except Exception as error:
            self._error = error
        self.ended_at = self._clock()
        self._took_seconds = self.ended_at - began_at

    def let_in(self) -> None:
        """Take over what the thread has found."""
        added, error, self._added, self._error = self._added, self._error, 0, None
        if error:
            raise error
        if added:
            self.table.backlog.returned(added)
