"""Which keys are still to be made."""

from collections.abc import Sequence
from itertools import count
from typing import Any

import datajoint as dj
from datajoint.expression import QueryExpression

from djdist._job import Key
from djdist.pipeline.rights import check_key_is_seen


def keys_to_make(table: dj.Table, restrictions: Sequence[Any], max_calls: int | None) -> list[Key]:
    """Return the keys that are not in the table yet, as ``populate()`` without a jobs table does."""
    check_key_is_seen(table, table)
    todo = table._jobs_to_do(restrictions)
    check_key_is_seen(table, todo)
    todo - table.proj()  # DataJoint refuses keys that come from elsewhere than the table's
    keys: list[Key] = missing_keys(todo, table, in_order=True, limit=max_calls).keys()
    return keys


def new_keys(todo: QueryExpression, jobs: dj.Job, known: QueryExpression) -> QueryExpression:
    """Return the query of the keys of new jobs: those of a key source without row and without known job."""
    missing = missing_keys(todo, jobs.target, known)
    return dj.U(*jobs.primary_key) & missing if has_several_keys_per_job(todo, jobs) else missing


def has_several_keys_per_job(todo: QueryExpression, jobs: dj.Job) -> bool:
    """Return whether several keys of the key source may fall on one job."""
    return len(todo.primary_key) > len(jobs.primary_key)


def missing_keys(
    todo: QueryExpression, *tables: QueryExpression, in_order: bool = False, limit: int | None = None
) -> QueryExpression:
    """Return the query of the keys that are in none of some tables, as ``todo - table`` does.

    PostgreSQL takes minutes for its NOT IN with 150,000 keys, and an instant for a join; for NOT EXISTS,
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
    return as_expression(missing if limit is None else f"{missing} LIMIT {limit}", todo)


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


_numbers = count()
"""Joined, no two of them may have the same name."""


def as_expression(sql: str, like: QueryExpression) -> QueryExpression:
    """Return a query's rows as DataJoint reads those of its own queries."""
    expression = QueryExpression()
    expression._connection, expression._support = (
        like.connection,
        [f"({sql}) AS djdist_keys_{next(_numbers)}"],
    )
    expression._heading = like.heading.make_subquery_heading()
    return expression
