"""A jobs table as its store has to know it, without DataJoint."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import datajoint as dj
from datajoint.expression import QueryExpression

from djdist.database.sessions import TIME_ZONE
from djdist.errors import OptionError
from djdist.pipeline.expected import held_back
from djdist.pipeline.foreign_keys import AttributeMap
from djdist.pipeline.jobs_table_spec import PARENTS, Following, JobsTableSpec, KeysSpec
from djdist.pipeline.key_sources import restricted_at
from djdist.pipeline.keys import has_several_keys_per_job, missing_keys, new_keys
from djdist.pipeline.plan import Plan, PlannedTable
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
        uuids=_binary_uuids(jobs, jobs.primary_key),
        several_keys_per_job=has_several_keys_per_job(todo, jobs),
        target_key=tuple(name for name in todo.primary_key if name in table.primary_key),
        key_source_sql=_plain_sql(todo),
        restricted_sql=_plain_sql(wanted) if restrictions else None,
        new_keys_sql=_plain_sql(new_keys(wanted, jobs, known=jobs)),
        keep_completed=table.connection._config.jobs.keep_completed,
        time_zone=_time_zone(table.connection),
    )


def jobs_table_spec_of(
    plan: Plan, planned: PlannedTable, jobs: dj.Job, *, ship_credentials: bool = True
) -> JobsTableSpec:
    """Return what a store has to know of the jobs table of one of a run's tables."""
    return replace(
        jobs_table_spec(jobs, planned.restrictions, ship_credentials=ship_credentials),
        table=planned.name,
        follows=_follows(plan, planned, lambda todo: new_keys(todo, jobs, known=jobs)),
        held_back=_held_back(plan, planned, has_jobs_tables=True),
    )


def keys_spec_of(plan: Plan, planned: PlannedTable, *, ship_credentials: bool = True) -> KeysSpec:
    """Return what a store without a jobs table has to know of one of a run's tables."""
    table = planned.table
    check_key_is_seen(table, table)
    todo = table._jobs_to_do(planned.restrictions)
    check_key_is_seen(table, todo)
    todo - table.proj()  # DataJoint refuses keys that come from elsewhere than the table's
    return KeysSpec(
        settings=settings_of(table.connection, ship_credentials=ship_credentials),
        table=planned.name,
        schema=table.database,
        key=tuple(todo.primary_key),
        uuids=_binary_uuids(todo, todo.primary_key),
        missing_keys_sql=_plain_sql(missing_keys(todo, table, in_order=True)),
        follows=_follows(plan, planned, lambda todo: missing_keys(todo, table)),
        held_back=_held_back(plan, planned, has_jobs_tables=False),
    )


def _follows(
    plan: Plan, planned: PlannedTable, new: Callable[[QueryExpression], QueryExpression]
) -> tuple[Following, ...]:
    conditions = dj.AndList(planned.restrictions)
    return tuple(
        _following(
            plan[follow.table],
            follow.attributes,
            new((restricted_at(planned.table, follow.key, PARENTS) & conditions).proj()),
        )
        for follow in planned.follows
    )


def _held_back(plan: Plan, planned: PlannedTable, *, has_jobs_tables: bool) -> tuple[Following, ...]:
    return tuple(
        _following(plan[table], attributes, dj.U().aggr(query & PARENTS, keys="count(*)"), has_jobs_tables)
        for table, attributes, query in held_back(plan, planned)
    )


def _following(
    parent: PlannedTable, attributes: AttributeMap, query: QueryExpression, has_jobs_table: bool = False
) -> Following:
    table, adapter = parent.table, parent.table.connection.adapter
    columns, names = zip(*attributes, strict=True)
    jobs_table = f"~~{table.table_name.lstrip('_')}"
    return Following(
        parent=parent.name,
        columns=tuple(map(adapter.quote_identifier, columns)),
        names=names,
        uuids=_binary_uuids(table, names),
        sql=_plain_sql(query),
        jobs_table=adapter.make_full_table_name(table.database, jobs_table) if has_jobs_table else None,
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


def _binary_uuids(query: QueryExpression, names: Sequence[str]) -> frozenset[str]:
    is_binary = query.connection.adapter.backend == "mysql"
    return frozenset(name for name in names if is_binary and query.heading[name].uuid)
