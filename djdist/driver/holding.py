"""Holds tables back whose keys may be made from any row of others."""

from collections.abc import Callable, Collection, Iterable, Mapping

from djdist.driver.tables import TableJobs, Tables


class Holding:
    """Lets no key begin before all tables are done of which it may read any row, as in runs table by table.

    In a run that watches, keys may come for ever. There a table waits for those only that were known when
    it began to wait, table by table from upstream, as in a loop that populates one table after the other.

    Parameters
    ----------
    tables : Tables
        Those of the run, those upstream first.
    others_hold : callable
        Tells whether others are making keys of some tables.
    watches : bool
        The run goes on when nothing is left.
    """

    def __init__(
        self, tables: Tables, others_hold: Callable[[Iterable[str]], bool], *, watches: bool
    ) -> None:
        self._tables = [*tables]
        self._others_hold = others_hold
        self._above = self._all_above()
        self._in_flight: Mapping[str, int] = {}
        self._rounds = {
            table.name: _Round([tables[name] for name in self._above[table.name]])
            for table in tables
            if watches and table.recipe.after
        }

    def note_done(self, table: str) -> None:
        """Note that a key of a table was made or has failed."""
        for each in self._rounds.values():
            each.note_done(table)

    def hold(self, in_flight: Mapping[str, int], coming: Collection[str]) -> None:
        """Say of each table whether it is held, given what is in flight and which tables get more keys."""
        done, busy = set[str](), {*coming, *(name for name, count in in_flight.items() if count)}
        self._in_flight = in_flight
        for table in self._tables:
            table.is_held = bool(table.recipe.after) and not self._may_begin(table, done, busy)
            upstream = done.issuperset((*table.recipe.upstream, *table.recipe.after))
            if upstream and table.backlog.empty and table.name not in busy:
                done.add(table.name)

    def _may_begin(self, table: TableJobs, done: set[str], busy: Collection[str]) -> bool:
        if done.issuperset(table.recipe.after) and not (table.is_held and self._others_hold_above(table)):
            return True
        if table.name not in self._rounds:
            return False
        is_empty = table.backlog.empty and table.name not in busy
        begin_again = not table.is_held and is_empty
        return self._rounds[table.name].is_over(done, self._known, begin_again=begin_again)

    def _known(self, table: TableJobs) -> int:
        """Count the keys of a table that are in flight or pending."""
        return self._in_flight.get(table.name, 0) + table.store.pending()

    def _others_hold_above(self, table: TableJobs) -> bool:
        return self._others_hold(self._above[table.name])

    def _all_above(self) -> dict[str, list[str]]:
        above: dict[str, dict[str, None]] = {}
        for table in self._tables:
            direct = [n for n in (*table.recipe.upstream, *table.recipe.after) if n in above]
            above[table.name] = {each: None for name in direct for each in (*above[name], name)}
        return {name: [*found] for name, found in above.items()}


class _Round:
    """What a table of a run that watches waits for: what was known of each table upstream, one by one."""

    def __init__(self, above: list[TableJobs]) -> None:
        self._above = above
        self._begin()

    def _begin(self) -> None:
        self._stage, self._left = 0, -1

    def note_done(self, table: str) -> None:
        if self._stage < len(self._above) and self._above[self._stage].name == table:
            self._left -= self._left > 0

    def is_over(self, done: Collection[str], known: Callable[[TableJobs], int], *, begin_again: bool) -> bool:
        """Return whether all that was known has been made; ``begin_again`` once the table has used that."""
        if begin_again:
            self._begin()
        while self._stage < len(self._above) and self._is_done(self._above[self._stage], done, known):
            self._stage, self._left = self._stage + 1, -1
        return self._stage == len(self._above)

    def _is_done(self, table: TableJobs, done: Collection[str], known: Callable[[TableJobs], int]) -> bool:
        if table.name in done:
            return True
        if self._left < 0:
            self._left = known(table)
        return self._left == 0
