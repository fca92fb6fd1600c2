"""The statements of workers, who have no SQLAlchemy loaded: as plain SQL."""

from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.sql.compiler import SQLCompiler

from djdist.database.job_statements import JobStatements, Statement, key_name
from djdist.database.sessions import SNAPSHOT_OFF, server_time
from djdist.job_stores.jobs_table.conditions import Conditions
from djdist.job_stores.jobs_table.functions import without_index
from djdist.pipeline.jobs_table_spec import JobsTableSpec

DIALECTS = {"mysql": mysql.dialect, "postgresql": postgresql.dialect}


def job_statements(where: Conditions, token: int) -> JobStatements:
    """Return what the workers of a run do to its jobs.

    What is the same for all jobs is part of the SQL, so that workers fill in only what they know of one.
    """
    jobs, spec = where.columns, where.spec
    key = sa.and_(*[column == sa.bindparam(key_name(column.name)) for column in where.key])
    mine = [
        without_index(jobs.status) == sa.literal_column("'reserved'"),
        jobs.connection_id == sa.bindparam("token"),
    ]
    worker: dict[str, Any] = {"host": sa.bindparam("worker_host"), "pid": sa.bindparam("worker_pid")}
    nobody: dict[str, Any] = {"host": sa.literal_column("''"), "pid": sa.literal_column("0")}
    begun_here = [*mine, *(jobs[name] == parameter for name, parameter in worker.items())]
    not_begun = [*mine, jobs.pid == sa.literal_column("0")]
    change: sa.Update = sa.update(where.table)
    held: sa.Select[Any] = sa.select(sa.literal_column("1")).where(*begun_here)

    def compiled(statement: sa.ClauseElement) -> Statement:
        return _compiled(statement, spec.settings.backend)

    return JobStatements(
        token=token,
        key=compiled(key.self_group()),
        key_columns=compiled(sa.tuple_(*where.key)).sql,
        begin=compiled(change.where(*not_begun).values(worker)),
        held=compiled(held),
        made=compiled(held.where(where.is_made)),
        hand_back=compiled(change.where(*begun_here).values(nobody)),
        finish=_unhindered(compiled(_ended(where).where(*begun_here)), spec),
    )


def _ended(where: Conditions) -> sa.Update | sa.Delete:
    """End a job in ``make()``'s transaction, whose session may have another time zone than the server."""
    if not where.spec.keep_completed:
        return sa.delete(where.table)
    now = server_time(where.spec.settings.backend, where.spec.time_zone)
    success: dict[str, Any] = {
        "status": sa.literal_column("'success'"),
        "completed_time": sa.literal_column(now),
        "duration": sa.bindparam("seconds"),
    }
    return sa.update(where.table).values(success)


def _unhindered(finish: Statement, spec: JobsTableSpec) -> Statement:
    """Allow ``make()``'s transaction to change in its last statement a job that was renewed since."""
    if spec.settings.backend == "postgresql":
        return finish  # the transaction itself allows it
    return replace(finish, sql=f"{SNAPSHOT_OFF} {finish.sql}")


def _compiled(statement: sa.ClauseElement, backend: str) -> Statement:
    compiled = statement.compile(dialect=DIALECTS[backend](paramstyle="format"))
    assert isinstance(compiled, SQLCompiler) and compiled.positiontup is not None
    return Statement(str(compiled), tuple(compiled.positiontup))
