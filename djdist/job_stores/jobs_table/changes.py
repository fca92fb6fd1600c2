"""Finds jobs and changes them, without waiting for others and without letting them wait."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa

from djdist._job import Job
from djdist.job_stores.jobs_table.conditions import Conditions, Where
from djdist.job_stores.jobs_table.functions import NOW, same_key, without_index
from djdist.job_stores.jobs_table.transactions import SETTINGS, TransactionsOn, ending_with

BATCH = 500
"""So many jobs are changed by one statement: few trips to the server, and no locks held for long."""

UNRESERVED = {
    "status": "pending",
    "reserved_time": None,
    "user": "",
    "host": "",
    "pid": 0,
    "connection_id": 0,
    "version": "",
}
FRESH = UNRESERVED | {
    "created_time": NOW, "scheduled_time": NOW, "completed_time": None,
    "duration": None, "error_message": "", "error_stack": None,
}  # fmt: skip

Statement = TypeVar("Statement", bound=sa.Executable)
OfStatus = Callable[[sa.ColumnElement[Any]], Where]


class Changes:
    """Finds and changes jobs.

    Parameters
    ----------
    where : Conditions
        Those on the jobs table.
    transactions : TransactionsOn
        Where it is done.
    """

    def __init__(self, where: Conditions, transactions: TransactionsOn) -> None:
        self._where = where
        self._transactions = transactions

    def found(self, *conditions: sa.ColumnElement[bool]) -> list[Job]:
        """Return the jobs that fulfil some conditions."""
        return self._transactions.run_one(
            lambda connection: self.jobs_in(connection.execute(self._where.keys(*conditions)))
        )

    def jobs_in(self, rows: sa.CursorResult[Any]) -> list[Job]:
        """Return the jobs whose keys are the rows of an answer."""
        table = self._where.spec.table
        names = tuple(map(str, rows.keys()))  # plain ones, or each worker would import SQLAlchemy for them
        return [Job(table, dict(zip(names, row, strict=True))) for row in rows]

    def owned_among(self, jobs: Sequence[Job], *conditions: sa.ColumnElement[bool]) -> list[Job]:
        """Return which of some jobs the run has reserved, if they fulfil some conditions."""
        owned = [*self._where.owned, *conditions]
        return [job for batch in batches(jobs) for job in self.found(*owned, self._where.among(batch))]

    def change_owned(self, jobs: Sequence[Job], change: sa.Update) -> int:
        """Change those of some jobs that the run has reserved; return how many."""
        owned = change.where(*self._where.owned)
        execute, among = self._transactions.execute, self._where.among
        return sum(execute(owned.where(among(batch))) for batch in batches(jobs))

    def change_unlocked(
        self, jobs: Sequence[Job], conditions: Where, change: sa.Update | sa.Delete
    ) -> list[Job]:
        """Change jobs and return them, but for locked ones, whose worker may be frozen before its COMMIT."""

        def change_batch(connection: sa.Connection, batch: Sequence[Job]) -> list[Job]:
            among = self._where.keys(self._where.among(batch), *conditions)
            unlocked = self.jobs_in(connection.execute(among.with_for_update(skip_locked=True)))
            if unlocked:
                connection.execute(change.where(self._where.among(unlocked)))
            return unlocked

        def change_at_once(connection: sa.Connection, batch: Sequence[Job]) -> list[Job]:
            among = self._where.keys(self._where.among(batch), *conditions)
            return self.jobs_in(
                connection.execute(self.changed(change, among.with_for_update(skip_locked=True)))
            )

        if self._where.spec.settings.backend == "postgresql":
            run, act = self._transactions.run_one, change_at_once
        else:
            run, act = self._transactions.run, change_batch
        return [job for batch in batches(jobs) for job in run(partial(act, batch=batch))]

    def changed(self, change: sa.Update | sa.Delete, jobs: sa.Select[Any], *steps: str) -> sa.Executable:
        """Return the statement that changes the jobs that a query locks, and gives all that it gives of them.

        PostgreSQL finds them by their key, and reads no other one, as its statistics might suggest.
        """
        locked, key = jobs.cte("locked"), self._where.spec.key
        statement = change.where(same_key(locked, self._where.table, key)).returning(*locked.c)
        return discouraging(statement, "postgresql", "hashjoin", "mergejoin", *steps)

    def change_all(self, condition: OfStatus, change: sa.Update | sa.Delete) -> int:
        """Change all jobs for whose status, and more, a condition holds; return how many.

        They are found by a read that locks nothing, then locked by their key as workers lock
        theirs. Locked by the index on status, driver and worker could wait for each other.
        """
        status = self._where.columns.status
        still = condition(without_index(status))

        def change_batch(connection: sa.Connection, batch: Sequence[Job]) -> int:
            with lenient(connection, self._where.spec.settings.backend):
                statement = change.where(self._where.among(batch), *still)
                return int(connection.execute(statement).rowcount)

        found = self.found(*condition(status))
        return sum(self._transactions.run(partial(change_batch, batch=batch)) for batch in batches(found))


def batches(jobs: Sequence[Job], size: int = BATCH) -> Iterator[Sequence[Job]]:
    """Part jobs into as many as one statement changes."""
    return (jobs[first : first + size] for first in range(0, len(jobs), size))


@contextmanager
def lenient(connection: sa.Connection, backend: str) -> Iterator[None]:
    """Make MySQL evaluate a key source in a change as in a SELECT, where a division by zero gives NULL.

    In its strict mode, which keeps what is written right, the same division is an error there.
    """
    if backend != "mysql":
        yield
        return
    connection.exec_driver_sql("SET @djdist_mode = @@sql_mode, SESSION sql_mode = 'ONLY_FULL_GROUP_BY'")
    with ending_with(connection.exec_driver_sql, "SET SESSION sql_mode = @djdist_mode"):
        yield


def discouraging(statement: Statement, backend: str, *steps: str) -> Statement:
    """Return a statement that keeps PostgreSQL from a plan by what travels with it."""
    if backend != "postgresql" or not steps:
        return statement
    return statement.execution_options(**{SETTINGS: f"{_settings(steps)}; "})


def discourage(connection: sa.Connection, backend: str, *steps: str) -> None:
    """Keep PostgreSQL from a plan that its statistics suggest until it has seen a refresh's new jobs."""
    if backend == "postgresql" and steps:
        connection.exec_driver_sql(_settings(steps))


def _settings(steps: Sequence[str]) -> str:
    return "; ".join(f"SET LOCAL enable_{step} = off" for step in steps)
