"""What djdist needs to know of a DataJoint table: its keys, its make(), its jobs table."""

import inspect
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import datajoint as dj
from datajoint.expression import QueryExpression

from djdist._job import Key
from djdist.database.dbapi import ConnectionSettings
from djdist.database.errors import is_infrastructure
from djdist.database.sessions import TIME_ZONE
from djdist.database.watchdog import watched
from djdist.errors import DatabaseError, OptionError
from djdist.pipeline.jobs_table_source import JobsTableSource
from djdist.pipeline.rights import check_key_is_seen
from djdist.shipping.packing import open_dbapi_connection, quiet, settings_of

logger = logging.getLogger(__name__)

PARTS = ("make_fetch", "make_compute", "make_insert")
MAKE = ("make", "_make_tuples", *PARTS)
PRIORITIES = {"mysql": range(-128, 128), "postgresql": range(-32768, 32768)}


def check_populates(table: Any) -> None:
    """Raise a clear error for what can't be populated.

    Raises
    ------
    OptionError
        It is not a Computed or Imported table, has no ``make`` that could be called, or no schema.
    datajoint.DataJointError
        The table is restricted or a transaction is open, as DataJoint says it.
    """
    name = type(table).__name__
    if not isinstance(table, dj.Table) or not isinstance(table, dj.AutoPopulate):
        raise OptionError(f"{name} is not a dj.Computed or dj.Imported table, so it can't be populated.")
    if not has_make(table):
        raise OptionError(
            f"{name} has no make(): define make(self, key), or make_fetch, make_compute and make_insert."
        )
    if asynchronous := [part for part in MAKE if _is_asynchronous(getattr(table, part, None))]:
        raise OptionError(
            f"{name}.{asynchronous[0]} is asynchronous, and nobody would await it: write def, not async def, "
            "and call asyncio.run() in it."
        )
    check_has_schema(table)
    if table.restriction:
        raise dj.DataJointError(
            "Cannot call populate on a restricted table. Instead, pass conditions to populate() as arguments."
        )
    if table.connection.in_transaction:
        raise dj.DataJointError("Populate cannot be called during a transaction.")


def check_has_schema(table: Any) -> None:
    """Raise OptionError for a table that was never declared."""
    if table._connection is None or not table.database:
        raise OptionError(
            f"{type(table).__name__} belongs to no schema yet: put @schema above it, and activate the schema."
        )


def _is_asynchronous(part: Any) -> bool:
    return inspect.iscoroutinefunction(part) or inspect.isasyncgenfunction(part)


def has_make(table: Any) -> bool:
    """Return whether a table's class says how to make a key."""
    return (
        hasattr(table, "_make_tuples")
        or type(table).make is not dj.AutoPopulate.make
        or all(hasattr(table, part) for part in PARTS)
    )


def check_priority(table: dj.Table, priority: int | None) -> None:
    """Raise OptionError for a priority that the jobs table can't hold."""
    allowed = PRIORITIES[table.connection.adapter.backend]
    if priority is not None and priority not in allowed:
        raise OptionError(
            f"priority={priority!r} does not fit the jobs table: use a whole number from {allowed[0]} to "
            f"{allowed[-1]} (the smaller, the more urgent). It may come from dj.config.jobs.default_priority."
        )


def keys_to_make(table: dj.Table, restrictions: Sequence[Any], max_calls: int | None) -> list[Key]:
    """Fetch the keys that are not in the table yet, as ``populate()`` without a jobs table does."""
    check_key_is_seen(table, table)
    todo = table._jobs_to_do(restrictions)
    check_key_is_seen(table, todo)
    todo - table.proj()  # DataJoint refuses keys that come from elsewhere than the table's
    keys: list[Key] = missing_keys(todo, table, in_order=True, limit=max_calls).keys()
    return keys


def missing_keys(
    todo: QueryExpression, *tables: QueryExpression, in_order: bool = False, limit: int | None = None
) -> QueryExpression:
    """Find the keys that are in none of some tables, as ``todo - table`` does, whose NOT IN takes long.

    PostgreSQL takes minutes for it with 150,000 keys, and an instant for a join; for NOT EXISTS,
    MariaDB looks a key up again and again.
    """
    quote = todo.connection.adapter.quote_identifier
    source, order = f"({todo.make_sql()}) AS todo", ""
    if in_order and todo.connection.adapter.backend == "postgresql":  # its joins don't keep the order
        source = f"(SELECT todo.*, row_number() OVER () AS djdist_position FROM {source}) AS todo"
        order = " ORDER BY djdist_position"
    joins = [_outer_join(todo, table, f"table{number}") for number, table in enumerate(tables)]
    absent = [f"table{number}.{quote(table.primary_key[0])} IS NULL" for number, table in enumerate(tables)]
    names = ", ".join(f"todo.{quote(name)}" for name in todo.primary_key)
    missing = f"SELECT {names} FROM {source} {' '.join(joins)} WHERE {' AND '.join(absent)}{order}"
    return _as_expression(missing if limit is None else f"{missing} LIMIT {limit}", todo)


def _outer_join(todo: QueryExpression, table: QueryExpression, alias: str) -> str:
    """Join rows of the same key; as for NOT IN, what is NULL in a key may be the same as anything."""
    quote = todo.connection.adapter.quote_identifier
    shared = [name for name in todo.primary_key if name in table.primary_key]
    same = [
        f"({alias}.{quote(n)} = todo.{quote(n)}"
        + (f" OR todo.{quote(n)} IS NULL)" if todo.heading[n].nullable else ")")
        for n in shared
    ]
    return f"LEFT JOIN ({table.proj().make_sql()}) AS {alias} ON {' AND '.join(same) or 'TRUE'}"


def _as_expression(sql: str, like: QueryExpression) -> QueryExpression:
    """Return a query's rows as DataJoint reads those of its own queries."""
    expression = QueryExpression()
    expression._connection, expression._support = like.connection, [f"({sql}) AS djdist_keys"]
    expression._heading = like.heading.make_subquery_heading()
    return expression


def jobs_table_source(
    jobs: dj.Job, restrictions: Sequence[Any] = (), *, ship_credentials: bool = True
) -> JobsTableSource:
    """Describe a jobs table to its store."""
    table = jobs.target
    todo, wanted = table._jobs_to_do(()), table._jobs_to_do(restrictions)
    check_key_is_seen(table, todo)
    missing = [name for name in jobs.primary_key if name not in todo.primary_key]
    if missing:
        raise OptionError(
            f"key_source of {type(table).__name__} lacks {', '.join(missing)} of its primary key."
        )
    is_finer = len(todo.primary_key) > len(jobs.primary_key)
    new_keys = missing_keys(wanted, table, jobs)
    return JobsTableSource(
        settings=settings_of(table.connection, ship_credentials=ship_credentials),
        table=type(table).__name__,
        schema=table.database,
        jobs_table=jobs.table_name,
        target_table=table.table_name,
        key=tuple(jobs.primary_key),
        uuids=frozenset(n for n in jobs.primary_key if _is_binary_uuid(jobs, n)),
        finer_source=is_finer,
        target_key=tuple(name for name in todo.primary_key if name in table.primary_key),
        key_source_sql=plain_sql(todo),
        restricted_sql=plain_sql(wanted) if restrictions else None,
        new_keys_sql=plain_sql(dj.U(*jobs.primary_key) & new_keys if is_finer else new_keys),
        keep_completed=table.connection._config.jobs.keep_completed,
        time_zone=_time_zone(table.connection),
    )


def _time_zone(connection: dj.Connection) -> str | None:
    """Ask PostgreSQL once what a worker would else have to ask with each key that it makes."""
    if connection.adapter.backend == "mysql" or not connection._config.jobs.keep_completed:
        return None
    return str(connection.query(f"SELECT {TIME_ZONE['postgresql']}").fetchone()[0])


def plain_sql(query: QueryExpression) -> str:
    """Return a query as the server should read it.

    DataJoint doubles the percent signs of literals for a driver that formats.
    """
    return str(query.make_sql()).replace("%%", "%")


def condition_sql(query: QueryExpression) -> str:
    """Return a restricted table's condition as the server should read it."""
    return str(query.where_clause()).replace("%%", "%").removeprefix(" WHERE ")


def job_columns(key: Key, settings: ConnectionSettings) -> dict[str, Any]:
    """Return a key's values as the database's driver takes them."""
    binary = settings.backend == "mysql"
    return {k: v.bytes if binary and isinstance(v, UUID) else v for k, v in key.items()}


def declared_type(table: dj.Table, attribute: Any) -> str | None:
    """Find an attribute's type in the definition of the table that it comes from."""
    if attribute.original_type or not attribute.lineage:
        return str(attribute.original_type) if attribute.original_type else None
    schema, origin, name = attribute.lineage.split(".")
    full_name = table.connection.adapter.make_full_table_name(schema, origin)
    declared = dj.FreeTable(table.connection, full_name).heading[name].original_type
    return str(declared) if declared else None


def user_of(table: dj.Table) -> str:
    """Return the connection's user, as the jobs table records it."""
    return str(table.connection.get_user())


def code_version(table: dj.Table) -> str:
    """Return the git commit of the code that makes a table's keys, if the settings ask for it.

    It is looked up where the table's module lies, or in the working folder for one
    that was typed into a notebook.
    """
    if table.connection._config.jobs.version_method != "git":
        return ""
    module_file = getattr(sys.modules.get(type(table).__module__), "__file__", None)
    folder = Path(module_file).parent if module_file else Path.cwd()
    try:
        git = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def end_session(connection: dj.Connection) -> None:
    """Release what a session holds: a transaction, locks, or a socket that is dead."""
    with suppress(Exception):
        connection.close()


def connect_anew(connection: dj.Connection) -> None:
    """Begin a session that holds nothing."""
    end_session(connection)
    with quiet():
        connection.connect()
    connection._in_transaction = False


def is_duplicate(error: BaseException) -> bool:
    """Return whether somebody else has inserted the same row."""
    return isinstance(error, dj.errors.DuplicateError)


def is_made(table: Any, key: Key) -> bool:
    """Return whether a key is in the table."""
    return bool(key in table)


_in_use = threading.RLock()


@contextmanager
def reachable(connection: dj.Connection) -> Iterator[None]:
    """Use the caller's own connection, one thread at a time, and say it clearly when it is gone.

    None of the user's code that may wait for other threads is called while it is used.

    Raises
    ------
    DatabaseError
        The database can't be reached by this connection.
    """
    try:
        reopen = partial(open_dbapi_connection, settings_of(connection))
        with _in_use, watched(connection, reopen):
            yield
    except Exception as error:
        if not is_infrastructure(error):
            raise
        place = f"{connection.conn_info['host']}:{connection.conn_info['port']}"
        raise DatabaseError(
            f"Lost connection to the database at {place}: {error}. "
            "See that it runs and that dj.config.database names it, then call table.connection.connect()."
        ) from error


def _is_binary_uuid(jobs: dj.Job, name: str) -> bool:
    return bool(jobs.heading[name].uuid) and jobs.connection.adapter.backend == "mysql"
