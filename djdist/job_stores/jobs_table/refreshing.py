"""Brings the jobs up to date with the key source and with what is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql

from djdist._job import Job
from djdist.errors import DatabaseError
from djdist.job_stores.jobs_table import lease
from djdist.job_stores.jobs_table.advisory_lock import advisory_lock
from djdist.job_stores.jobs_table.changes import FRESH, UNRESERVED, Changes, discourage, discouraging, lenient
from djdist.job_stores.jobs_table.conditions import Conditions, Where
from djdist.job_stores.jobs_table.following import coming_of, parents_in
from djdist.job_stores.jobs_table.functions import in_seconds, verbatim
from djdist.job_stores.jobs_table.transactions import TransactionsOn
from djdist.pipeline.jobs_table_spec import Following


@dataclass(frozen=True)
class Refreshing:
    """How to refresh; ``stale_seconds`` and ``orphan_seconds`` of 0 spare such jobs."""

    priority: int
    delay_seconds: float = 0
    stale_seconds: float = 0
    orphan_seconds: float = 0


def refresh(
    where: Conditions,
    changes: Changes,
    transactions: TransactionsOn,
    options: Refreshing,
    *,
    looks_first: bool = False,
) -> dict[str, int]:
    """Add new keys, remove vanished ones, release what native workers left behind, and count all three.

    Where nothing is expected to have changed, one look spares the others, and the lock that adding takes.
    """
    steps = _Steps(where, changes, transactions)
    new, vanished, stale = steps.look(options.stale_seconds) if looks_first else (True, True, True)
    return {
        "orphaned": steps.free_orphans(options.orphan_seconds),
        "added": steps.add(options.priority, options.delay_seconds) if new else 0,
        "re_pended": steps.repend_completed(options.priority),
        "removed": (steps.remove_vanished() if vanished else 0)
        + (steps.remove_stale(options.stale_seconds) if stale else 0),
    }


def add_new(
    where: Conditions,
    changes: Changes,
    transactions: TransactionsOn,
    options: Refreshing,
    parents: Sequence[Job],
) -> int | None:
    """Add the new keys that come of some keys upstream, and count them; None where others add some now."""
    steps, added = _Steps(where, changes, transactions), 0
    for following in where.spec.follows:
        for batch in parents_in(parents, following):
            count = steps.add_coming_of(batch, following, options.priority, options.delay_seconds)
            if count is None:
                return None
            added += count
    return added


class _Steps:
    def __init__(self, where: Conditions, changes: Changes, transactions: TransactionsOn) -> None:
        self._where = where
        self._spec = where.spec
        self._changes = changes
        self._transactions = transactions

    def free_orphans(self, orphan_seconds: float) -> int:
        if not orphan_seconds:
            return 0
        native = sa.not_(lease.is_of_run(self._where.columns.connection_id))
        old = self._where.columns.reserved_time < in_seconds(-orphan_seconds)
        return self._changes.change_all(
            lambda status: [status == "reserved", native, old],
            sa.update(self._where.table).values(UNRESERVED),
        )

    def look(self, stale_seconds: float) -> tuple[bool, bool, bool]:
        """Return, by one statement, whether there are new keys, vanished ones, and stale jobs."""
        status, keys = self._where.columns.status, self._where.keys
        new = self._new_jobs(verbatim(self._spec.new_keys_sql), 0, 0)
        stale = self._stale(status, stale_seconds) if stale_seconds else [sa.false()]
        any_of_each = sa.select(*map(_any_of, (new, keys(*self._vanished(status)), keys(*stale))))
        query = discouraging(any_of_each, self._spec.settings.backend, "nestloop")
        row = self._transactions.run_one(lambda connection: connection.execute(query).one())
        has_new, has_vanished, has_stale = map(bool, row)
        return has_new, has_vanished, has_stale

    def add(self, priority: int, delay_seconds: float) -> int:
        new = verbatim(self._spec.new_keys_sql)
        return self._insert_missing(self._new_jobs(new, priority, delay_seconds), "nestloop") or 0

    def add_coming_of(
        self, parents: Sequence[Job], following: Following, priority: int, delay_seconds: float
    ) -> int | None:
        jobs = self._new_jobs(coming_of(parents, following), priority, delay_seconds)
        return self._insert_missing(jobs, "hashjoin", "mergejoin", waits=False)

    def _new_jobs(self, keys: sa.TextClause, priority: int, delay_seconds: float) -> sa.Select[Any]:
        columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in self._spec.key]
        new = keys.columns(*columns).subquery("new_keys")
        return sa.select(*new.c, sa.literal("pending"), sa.literal(priority), in_seconds(delay_seconds))

    def _insert_missing(self, rows: sa.Select[Any], *bad_steps: str, waits: bool = True) -> int | None:
        """Insert all at once, and leave alone what another refresh has added.

        PostgreSQL is first asked to insert without looking for that, in two thirds of the time.
        """
        jobs, key = self._where.table, self._where.key[0]
        names = [*self._spec.key, "status", "priority", "scheduled_time"]
        if self._spec.settings.backend == "mysql":
            insert = mysql.insert(jobs).from_select(names, rows)  # IGNORE would hide other errors, too
            return self._add_all(insert.on_duplicate_key_update({key.name: key}), bad_steps, waits=waits)
        try:
            return self._add_all(sa.insert(jobs).from_select(names, rows), bad_steps, waits=waits)
        except DatabaseError as refusal:
            if not isinstance(refusal.__cause__, sa.exc.IntegrityError):
                raise
        insert_new = postgresql.insert(jobs).from_select(names, rows).on_conflict_do_nothing()
        return self._add_all(insert_new, bad_steps, waits=waits)

    def _add_all(self, insert: sa.Executable, bad_steps: Sequence[str], *, waits: bool) -> int | None:
        """Add jobs without reading the jobs table, empty as it may have been, again for every key.

        The loop doesn't wait for a refresh of the whole table, whose lock spares both a deadlock.
        """
        backend, name = self._spec.settings.backend, str(self._where.table)

        def add(connection: sa.Connection) -> int | None:
            discourage(connection, backend, *bad_steps)
            lock = advisory_lock(connection, backend, name, waits=waits)
            with lock as is_held, lenient(connection, backend):
                return int(connection.execute(insert).rowcount) if is_held or waits else None

        return self._transactions.run(add)

    def repend_completed(self, priority: int) -> int:
        if not self._spec.keep_completed:
            return 0
        wanted = self._where.has_key_in(self._spec.restricted_sql or self._spec.key_source_sql)
        return self._changes.change_all(
            lambda status: [status == "success", wanted, ~self._where.is_made],
            sa.update(self._where.table).values(FRESH | {"priority": priority}),
        )

    def remove_vanished(self) -> int:
        return self._changes.change_all(self._vanished, sa.delete(self._where.table))

    def _vanished(self, status: sa.ColumnElement[Any]) -> Where:
        return [status.in_(["success", "error"]), self._unwanted, ~self._where.is_made]

    def remove_stale(self, stale_seconds: float) -> int:
        if not stale_seconds:
            return 0
        stale = partial(self._stale, stale_seconds=stale_seconds)
        return self._changes.change_all(stale, sa.delete(self._where.table))

    def _stale(self, status: sa.ColumnElement[Any], stale_seconds: float) -> Where:
        old = self._where.columns.created_time < in_seconds(-stale_seconds)
        return [status.in_(["pending", "success", "error"]), old, self._unwanted]

    @property
    def _unwanted(self) -> sa.ColumnElement[bool]:
        return ~self._where.has_key_in(self._spec.key_source_sql)


def _any_of(query: sa.Select[Any]) -> sa.ScalarSelect[Any]:
    """Return the number of a query's rows, up to one."""
    return sa.select(sa.func.count()).select_from(query.limit(1).subquery()).scalar_subquery()
