"""What key sources are made of, and which of them can be followed key by key."""

import inspect
from collections.abc import Iterable, Mapping
from functools import reduce
from operator import mul
from typing import Any

import datajoint as dj
from datajoint.expression import QueryExpression

from djdist.pipeline.foreign_keys import ForeignKey


def is_default(table: Any) -> bool:
    """Return whether the key source is DataJoint's own: the join of what the primary key refers to."""
    is_untouched = inspect.getattr_static(table, "key_source") is vars(dj.AutoPopulate)["key_source"]
    return is_untouched and getattr(type(table), "_key_source", None) is None


def query_of(table: Any) -> QueryExpression:
    """Return the key source with all its attributes, which may be given as a class."""
    source = table.key_source
    return source() if inspect.isclass(source) else source


def restricted_at(table: Any, key: ForeignKey, condition: str) -> QueryExpression:
    """Return the default key source, with a condition on the rows to which one of its foreign keys leads.

    So the condition stands where the server finds rows by their primary key, not outside of a join.
    """
    sources = []
    for parent, properties in table.parents(primary=True, as_objects=True, foreign_key_info=True):
        names = properties["attr_map"]
        is_meant = parent.full_table_name == key.parent and tuple(names.items()) == key.attributes
        sources.append(renamed(parent & condition if is_meant else parent, names))
    return reduce(mul, sources)


def renamed(parent: QueryExpression, names: Mapping[str, str]) -> QueryExpression:
    """Return the key of a parent's rows, named as a foreign key names it."""
    return parent.proj(**{name: other for name, other in names.items() if name != other})


def tables_read(query: QueryExpression, tables: Iterable[str]) -> set[str]:
    """Return which of some tables, given by their full names, a query reads."""
    sql = query.make_sql()
    return {table for table in tables if table in sql}


def is_row_by_row(query: QueryExpression, tables: Iterable[str]) -> bool:
    """Return whether each row stands for rows of some tables by itself, and no later row changes it.

    So it is for joins, projections, and restrictions by attributes. An aggregation, a union and a restriction
    by one of these tables may look at any of their rows.
    """
    if not isinstance(query, dj.Table) and type(query) is not QueryExpression:
        return False
    if query._top or query._distinct or any(is_left for is_left, _ in query._joins):
        return False
    if any(table in str(condition) for condition in query.restriction for table in tables):
        return False
    return all(is_row_by_row(part, tables) for part in query.support if isinstance(part, QueryExpression))
