"""Lets new keys in: those whose parents have just been made, and those that others brought about."""

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from djdist._job import Job, Policy
from djdist.driver.holding import Holding
from djdist.driver.tables import TableJobs, Tables
from djdist.driver.tolerance import Tolerance
from djdist.errors import DatabaseError

logger = logging.getLogger(__package__)

ROUND_SECONDS = 1.0
"""While all slots are busy nobody waits for new keys, so that one statement per table and second will do."""
BUSY_SECONDS = 0.2
"""Statements of different tables are not collected for longer, or a first result would come late."""
SHORT_SECONDS = 0.02
"""Most refreshes take less, and the loop waits no longer for one."""
ROUND_SHARE = 4
"""While slots are free, between two rounds passes this many times what one takes."""
WHOLE_SECONDS = 1.0
OTHERS_LOOK_SECONDS = 1.0
"""A run that waits for others looks so often whether they are still at work."""
OTHERS_SECONDS = 5.0
"""What others have made upstream is seen after this time."""
WHOLE_SHARE = 33
"""Reading whole key sources takes up to 3 % of the time."""
MOST_PARENTS = 2000
"""More parents than that wait for the next round."""
MOST_MARKED = 50_000
"""What comes of more keys than that is found by reading the whole key source."""
NEW = ("added", "re_pended", "orphaned")


class Streaming:
    """Adds the jobs of new keys while a run goes on.

    Keys that the run has made mark the tables downstream. A table that follows them gets its new
    keys by a statement that looks at nothing else. Another one, such as one with a ``key_source`` of its
    own, is refreshed as a whole, in a thread, as are all for what others have made. Before a run ends, all
    are refreshed that were last read before its last key was made, or before others were done.

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
        self._refreshes = [_Refresh(table, clock) for table in tables]
        for refresh in self._refreshes:
            for name in {*refresh.table.recipe.upstream, *refresh.table.recipe.after}:
                self._below[name].append(refresh)
        self._holding = Holding(tables, self._others_hold, watches=policy.watches)
        self._any_wait = any(table.recipe.after for table in tables)
        self._is_active = len(tables) > 1 or policy.watches
        self._round_ended_at, self._round_took_seconds = float("-inf"), 0.0
        self._thread: threading.Thread | None = None
        self._held: dict[str, int] = {}
        self._looked_at = self._changed_at = float("-inf")
        self._has_told = False

    def note_made(self, job: Job) -> None:
        """Note a key that is in its table now."""
        self._changed_at = self._clock()
        for refresh in self._below.get(job.table, ()):
            refresh.note_parent(job)
        self._holding.note_done(job.table)

    def note_failed(self, job: Job) -> None:
        """Note a key that will not be in its table."""
        self._holding.note_done(job.table)

    def begin(self) -> None:
        """Refresh the tables as a whole, but for those whose key source others have to complete first."""
        if len(self._tables) > 1:
            self._look_for_others()
        for refresh in self._refreshes:
            with self._tolerance.of(refresh.table):
                if refresh.table.recipe.after:
                    refresh.is_wanted = True
                else:
                    refresh.began_at = self._clock()
                    refresh.table.store.refresh()
                    refresh.ended_at = self._clock()

    def add(self, in_flight: Mapping[str, int], *, has_room: bool) -> None:
        """Let new keys in, if it is time for it."""
        if not self._is_active:
            return
        self._end_thread()
        if self._any_wait:
            self._others_hold(())  # before it is asked what comes: it may be what they have made
            self._holding.hold(in_flight, {r.table.name for r in self._refreshes if r.is_busy})
        self._add_followed(has_room=has_room)
        idle, took_seconds = not any(in_flight.values()), sum(r.took_seconds for r in self._refreshes)
        period_seconds = partial(self._period_seconds, took_seconds)
        self._begin_whole([r for r in self._free if r.is_due(period_seconds(r.table), at_once=idle)])

    def due_in_seconds(self, *, has_room: bool) -> float:
        """Return after which time the next keys are let in that follow what was made."""
        due_at = [refresh.follows_at(has_room=has_room) for refresh in self._free if refresh.marked]
        least_seconds = SHORT_SECONDS if has_room else BUSY_SECONDS
        pause_seconds = max(least_seconds, ROUND_SHARE * self._round_took_seconds)
        return max(self._round_ended_at + pause_seconds, min(due_at, default=float("inf"))) - self._clock()

    def may_add(self) -> bool:
        """Return whether more keys may come, now that nothing of the run is in flight and nothing pending.

        Others who are alive may be at work upstream; it is said once for whom the run waits. A run that
        watches will see by itself.
        """
        if self._policy.watches or not self._is_active:
            return False
        if self._others_hold(self._below):
            self._tell_of_others()
            return True
        while self._begin_whole([r for r in self._free if r.began_at < self._changed_at]):
            if self._thread:  # most end at once
                break
        is_read = self._thread is not None or any(refresh.is_busy for refresh in self._refreshes)
        return is_read or not self._tables.empty

    def wait(self, seconds: float) -> bool:
        """Wait for a refresh that goes on, not longer than that; return whether there was one."""
        if self._thread is None:
            return False
        self._thread.join(max(0.0, seconds))
        self._end_thread()
        return True

    @property
    def _free(self) -> "list[_Refresh]":
        return [refresh for refresh in self._refreshes if not refresh.table.is_held]

    def _period_seconds(self, took_seconds: float, table: TableJobs) -> float:
        """Return how often a table is refreshed by itself."""
        if self._policy.poll_seconds is not None:
            return self._policy.poll_seconds
        return max(OTHERS_SECONDS, WHOLE_SHARE * took_seconds) if table.recipe.upstream else float("inf")

    def _add_followed(self, *, has_room: bool) -> None:
        if self.due_in_seconds(has_room=has_room) > 0:
            return
        began_at = self._clock()
        for refresh in self._free:
            if refresh.follows_at(has_room=has_room) <= began_at:
                with self._tolerance.of(refresh.table):
                    refresh.add_followed()
        self._round_ended_at = self._clock()
        self._round_took_seconds = self._round_ended_at - began_at

    def _begin_whole(self, refreshes: "list[_Refresh]") -> bool:
        """Begin to refresh tables, those first that have waited the longest; return whether there are any."""
        if self._thread is None and refreshes:
            refreshes.sort(key=lambda refresh: refresh.ended_at)
            for refresh in refreshes:
                refresh.is_running = True
            self._thread = threading.Thread(
                target=_refresh_all, args=[refreshes], name="djdist-refresh", daemon=True
            )
            self._thread.start()
            self.wait(SHORT_SECONDS)
        return bool(refreshes)

    def _end_thread(self) -> None:
        if self._thread and not self._thread.is_alive():
            self._thread = None
        for refresh in self._refreshes:
            if refresh.has_found:
                with self._tolerance.of(refresh.table):
                    refresh.let_in()

    def _others_hold(self, names: Iterable[str]) -> bool:
        """Return whether others are making keys of these tables, which is asked once in a while."""
        pause_seconds = max(OTHERS_LOOK_SECONDS, self._policy.poll_seconds or 0)
        if self._clock() - self._looked_at >= pause_seconds:
            self._look_for_others()
        return not self._held.keys().isdisjoint(names)

    def _look_for_others(self) -> None:
        """Look who else is at work; what they have made is to be seen once they are done."""
        before, held = self._held, dict[str, int]()
        for table in map(self._tables.__getitem__, self._below):
            with self._tolerance.of(table):
                held[table.name] = table.store.held_by_others()
        self._held = {name: count for name, count in held.items() if count}
        self._looked_at = self._clock()
        for name in before.keys() - self._held.keys():
            self._changed_at = self._looked_at
            for refresh in self._below[name]:
                refresh.is_wanted = True

    def _tell_of_others(self) -> None:
        if not self._has_told:
            self._has_told = True
            what = ", ".join(f"{count} keys of {name}" for name, count in self._held.items())
            logger.info("Waiting for %s that others are making, for what comes after them", what)


def _refresh_all(refreshes: "Sequence[_Refresh]") -> None:
    for refresh in refreshes:
        refresh.whole()


class _Refresh:
    """What one table has to be brought up to date with."""

    def __init__(self, table: TableJobs, clock: Callable[[], float]) -> None:
        self.table = table
        self.marked: list[Job] = []
        self.is_wanted = self.is_running = False
        self.began_at = self.ended_at = self.followed_at = float("-inf")
        self.took_seconds = 0.0
        self._clock = clock
        self._found = deque[int | Exception]()

    def note_parent(self, job: Job) -> None:
        if job.table in self.table.recipe.follows and len(self.marked) < MOST_MARKED:
            self.marked.append(job)
        else:
            self.is_wanted = True

    @property
    def is_busy(self) -> bool:
        """Whether more is known to come than its jobs show."""
        return bool(self.marked or self.is_wanted or self.is_running or self.table.is_refused)

    def is_due(self, period_seconds: float, *, at_once: bool) -> bool:
        """Return whether it is time to refresh it as a whole; ``at_once`` where nothing else is to do."""
        if self.is_wanted and at_once:
            return True
        pause_seconds = min(WHOLE_SECONDS, period_seconds) if self.is_wanted else period_seconds
        return self._clock() - self.ended_at >= max(pause_seconds, WHOLE_SHARE * self.took_seconds)

    def follows_at(self, *, has_room: bool) -> float:
        """Return from when on it may get the keys that follow what was made."""
        return self.followed_at + (0.0 if has_room else ROUND_SECONDS)

    def add_followed(self) -> None:
        parents, self.marked = self.marked[:MOST_PARENTS], self.marked[MOST_PARENTS:]
        if not parents:
            return
        self.followed_at = self._clock()
        try:
            added = self.table.store.add_new(parents)
        except DatabaseError:
            self.is_wanted = True
            raise
        if added is None:  # some may be there
            self.marked = parents + self.marked
            self.table.backlog.returned(0)
        elif added:
            self.table.backlog.returned(added)

    def whole(self) -> None:
        """Refresh it, in a thread."""
        self.began_at, self.is_wanted = self._clock(), False
        try:
            changes = self.table.store.refresh()
            found: int | Exception = sum(changes.get(name, 0) for name in NEW)
        except Exception as error:
            found = error
        self.ended_at = self._clock()
        self.took_seconds = self.ended_at - self.began_at
        self._found.append(found)

    @property
    def has_found(self) -> bool:
        """Whether the thread has found something, which is asked for at every step."""
        return bool(self._found)

    def let_in(self) -> None:
        """Take over what the thread has found."""
        while self._found:
            found, self.is_running = self._found.popleft(), False
            if isinstance(found, Exception):
                self.is_wanted = True
                raise found
            if found:
                self.table.backlog.returned(found)
