"""The jobs table as SQLAlchemy knows it, and the conditions by which its jobs are found."""

import operator
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from djdist._job import Job
from djdist.database.job_statements import are_searched_as_list
from djdist.job_stores.jobs_table import lease
from djdist.job_stores.jobs_table.functions import (
    NOW,
    BinaryUuid,
    in_seconds,
    same_key,
    verbatim,
    without_index,
)
from djdist.pipeline.jobs_table_spec import JobsTableSpec

COLUMNS = (
    "status", "priority", "created_time", "scheduled_time", "reserved_time", "completed_time", "duration",
    "error_message", "error_stack", "user", "host", "pid", "connection_id", "version",
)  # fmt: skip

MYSQL_UPTIME: sa.ColumnElement[Any] = sa.literal_column(
    "(SELECT variable_value FROM /*M! information_schema.*//*!50701 performance_schema.*/global_status "
    "WHERE variable_name = 'Uptime')"
)
"""In seconds. MariaDB, which reads the first comment only, has it elsewhere."""

Where = Sequence[sa.ColumnElement[bool]]


class Conditions:
    """Conditions on the jobs of one table.

    Parameters
    ----------
    spec : JobsTableSpec
        Where the table is and which keys it should hold.
    token : int
        The run's.

    Attributes
    ----------
    table : sqlalchemy.Table
        The jobs table.
    columns : sqlalchemy.ColumnCollection
        Its columns.
    key : list of sqlalchemy.Column
        Those of its primary key.
    """

    def __init__(self, spec: JobsTableSpec, token: int) -> None:
        columns: list[sa.Column[Any]] = [_key_column(name, spec) for name in spec.key]
        columns += [sa.Column(name) for name in COLUMNS]
        self.spec = spec
        self.table = sa.Table(spec.jobs_table, sa.MetaData(), *columns, schema=spec.schema)
        self.columns = self.table.c
        self.key = [self.columns[name] for name in spec.key]
        self._token = token

    def keys(self, *conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
        """Return the query of the keys of jobs."""
        return sa.select(*self.key).where(*conditions)

    def among(self, jobs: Sequence[Job]) -> sa.ColumnElement[bool]:
        """Return the condition that finds jobs by their key, if possible compiled once for any number."""
        values = [tuple(job.key[name] for name in self.spec.key) for job in jobs]
        if not are_searched_as_list(values):
            return sa.or_(*[sa.and_(*map(operator.eq, self.key, value)) for value in values])
        if len(self.key) == 1:
            return self.key[0].in_([value for (value,) in values])
        return sa.tuple_(*self.key).in_(values)

    @property
    def mine(self) -> Where:
        """All reservations of the run, found by the index on status."""
        return self._reserved_by_run(self.columns.status)

    @property
    def owned(self) -> Where:
        """That a job, which is found by its key, is reserved by the run."""
        return self._reserved_by_run(without_index(self.columns.status))

    def _reserved_by_run(self, status: sa.ColumnElement[Any]) -> Where:
        return status == "reserved", self.columns.connection_id == self._token

    def due(self, max_priority: int | None) -> Where:
        """What the run may reserve now."""
        due = [self.columns.status == "pending", self.columns.scheduled_time <= NOW]
        if max_priority is not None:
            due.append(self.columns.priority <= max_priority)
        return [*due, *self.restricted]

    @property
    def restricted(self) -> Where:
        """That a job is one of those to which a call's restrictions confine it."""
        return [] if self.spec.restricted_sql is None else [self.has_key_in(self.spec.restricted_sql)]

    def expired(self, status: sa.ColumnElement[Any]) -> Where:
        """Reservations of runs whose lease is over."""
        token = self.columns.connection_id
        is_over = lease.is_over(token, self.columns.reserved_time, in_seconds)
        return status == "reserved", lease.is_of_run(token), is_over

    @property
    def is_held(self) -> sa.ColumnElement[bool]:
        """Whoever has reserved a job is alive, as far as the account may see native workers' sessions."""
        token, reserved_time = self.columns.connection_id, self.columns.reserved_time
        of_run, is_over = lease.is_of_run(token), lease.is_over(token, reserved_time, in_seconds)
        has_session = self._has_session if self.spec.settings.backend == "mysql" else self._has_backend
        return sa.or_(sa.and_(of_run, ~is_over), sa.and_(~of_run, has_session))

    @property
    def _has_session(self) -> sa.ColumnElement[bool]:
        """MySQL has the session that made a reservation; after a restart it gives the same numbers again."""
        processes = sa.table("processlist", sa.column("id"), schema="information_schema")
        is_younger = self.columns.reserved_time >= in_seconds(-MYSQL_UPTIME)
        return sa.and_(self.columns.connection_id.in_(sa.select(processes.c.id)), is_younger)

    @property
    def _has_backend(self) -> sa.ColumnElement[bool]:
        """PostgreSQL has the session that made a reservation; it gives numbers again at any time."""
        sessions = sa.table("pg_stat_activity", sa.column("pid"), sa.column("backend_start"))
        is_same = sessions.c.pid == self.columns.connection_id
        return sa.exists().where(is_same, sessions.c.backend_start <= self.columns.reserved_time)

    def has_key_in(self, query: str) -> sa.ColumnElement[bool]:
        """The key is one of a query's."""
        names = dict.fromkeys(self.spec.key + self.spec.target_key)
        keys = verbatim(query).columns(*[sa.column(name) for name in names]).subquery("keys_to_make")
        return sa.exists().where(same_key(keys, self.table, self.spec.key))

    @property
    def is_made(self) -> sa.ColumnElement[bool]:
        """The key is in the table that the jobs are of."""
        names = [name for name in self.spec.target_key if name in self.columns]
        columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in names]
        target = sa.table(self.spec.target_table, *columns, schema=self.spec.schema)
        return sa.exists().select_from(target).where(same_key(target, self.table, names))


def _key_column(name: str, spec: JobsTableSpec) -> sa.Column[Any]:
    return sa.Column(name, BinaryUuid() if name in spec.uuids else sa.types.NullType())
