"""A jobs table as its store has to know it, without DataJoint."""

from collections.abc import Sequence
from typing import Any

import datajoint as dj
from datajoint.expression import QueryExpression

from djdist.database.sessions import TIME_ZONE
from djdist.errors import OptionError
from djdist.pipeline.jobs_table_spec import JobsTableSpec
from djdist.pipeline.keys import has_several_keys_per_job, new_keys
from djdist.pipeline.rights import check_key_is_seen
from djdist.shipping.packing import settings_of


def jobs_table_spec(
    jobs: dj.Job, restrictions: Sequence[Any] = (), *, ship_credentials: bool = True
) -> JobsTableSpec:
    """Return what a store has to know of a jobs table."""
    table = jobs.target
    todo, wanted = table._jobs_to_do(()), table._jobs_to_do(restrictions)
    check_key_is_seen(table, todo)
    missing = [name for name in jobs.primary_key if name not in todo.primary_key]
    if missing:
        raise OptionError(
            f"key_source of {type(table).__name__} lacks {', '.join(missing)} of its primary key."
        )
    return JobsTableSpec(
        settings=settings_of(table.connection, ship_credentials=ship_credentials),
        table=type(table).__name__,
        schema=table.database,
        jobs_table=jobs.table_name,
        target_table=table.table_name,
        key=tuple(jobs.primary_key),
        uuids=frozenset(n for n in jobs.primary_key if _is_binary_uuid(jobs, n)),
        several_keys_per_job=has_several_keys_per_job(todo, jobs),
        target_key=tuple(name for name in todo.primary_key if name in table.primary_key),
        key_source_sql=_plain_sql(todo),
        restricted_sql=_plain_sql(wanted) if restrictions else None,
        new_keys_sql=_plain_sql(new_keys(wanted, jobs, known=jobs)),
        keep_completed=table.connection._config.jobs.keep_completed,
        time_zone=_time_zone(table.connection),
    )


def condition_sql(query: QueryExpression) -> str:
    """Return a restricted table's condition as the server should read it."""
    return str(query.where_clause()).replace("%%", "%").removeprefix(" WHERE ")


def declared_type(table: dj.Table, attribute: Any) -> str | None:
    """Return an attribute's type in the definition of the table that it comes from."""
    if attribute.original_type or not attribute.lineage:
        return str(attribute.original_type) if attribute.original_type else None
    schema, origin, name = attribute.lineage.split(".")
    full_name = table.connection.adapter.make_full_table_name(schema, origin)
    declared = dj.FreeTable(table.connection, full_name).heading[name].original_type
    return str(declared) if declared else None


def _plain_sql(query: QueryExpression) -> str:
    """Return a query as the server should read it.

    DataJoint doubles the percent signs of literals for a driver that formats.
    """
    return str(query.make_sql()).replace("%%", "%")


def _time_zone(connection: dj.Connection) -> str | None:
    """Ask PostgreSQL once what a worker would else have to ask with each key that it makes."""
    if connection.adapter.backend == "mysql" or not connection._config.jobs.keep_completed:
        return None
    return str(connection.query(f"SELECT {TIME_ZONE['postgresql']}").fetchone()[0])


def _is_binary_uuid(jobs: dj.Job, name: str) -> bool:
    return bool(jobs.heading[name].uuid) and jobs.connection.adapter.backend == "mysql"
