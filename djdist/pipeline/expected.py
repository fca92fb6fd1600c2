"""Which keys a table of a run will have once all that is upstream in the run is made."""

from collections.abc import Mapping
from functools import reduce
from operator import mul
from typing import Any

import datajoint as dj
from datajoint.expression import QueryExpression

from djdist.pipeline.foreign_keys import AttributeMap
from djdist.pipeline.key_sources import is_default, renamed
from djdist.pipeline.keys import as_expression, missing_keys
from djdist.pipeline.plan import Plan, PlannedTable

MOST_QUERIES = 50
"""Where a graph forks and joins again and again, a query of all that is above would have no end."""


def expected_keys(plan: Plan, planned: PlannedTable) -> QueryExpression:
    """Return the query of all keys that a table is to have, made or not.

    Parents in the run count with their own expected keys, unless there are too many of them above. A key
    source of one's own is taken as it stands, and so are Part tables, whose rows nobody knows before they are
    made.
    """
    if not is_default(planned.table):
        return planned.table._jobs_to_do(planned.restrictions)
    sizes = _sizes(plan)
    members = {name: m for m in plan.tables if sizes[name := m.table.full_table_name] <= MOST_QUERIES}
    parents = planned.table.parents(primary=True, as_objects=True, foreign_key_info=True)
    sources = [
        _expected_rows(plan, members.get(parent.full_table_name), parent, properties["attr_map"])
        for parent, properties in parents
    ]
    return (reduce(mul, sources) & dj.AndList(planned.restrictions)).proj()


def held_back(plan: Plan, planned: PlannedTable) -> list[tuple[str, AttributeMap, QueryExpression]]:
    """Return which keys are to come of each table upstream, and are in no table and no key source yet.

    Beside the upstream table's name and the query there are pairs of the key's attributes and its.
    """
    members = {member.table.full_table_name: member for member in plan.tables if member is not planned}
    primary = [key for key in plan.foreign_keys.of(planned.table.full_table_name) if key.primary]
    routes = plan.foreign_keys.routes(primary, members, beyond=True) if is_default(planned.table) else ()
    handed_down = {
        (route.table, pairs)
        for route in routes
        if (pairs := tuple(pair for pair in route.attributes if pair[1] in plan.keys[route.table]))
        and {name for _, name in pairs} == {*plan.keys[route.table]}
    }
    if not handed_down:
        return []
    todo = planned.table._jobs_to_do(planned.restrictions)
    to_come = missing_keys(expected_keys(plan, planned), planned.table, todo)
    return [(members[table].name, attributes, to_come) for table, attributes in sorted(handed_down)]


def _sizes(plan: Plan) -> dict[str, int]:
    """Return of how many queries that of each table's expected keys is made up."""
    sizes: dict[str, int] = {}
    for planned in plan.tables:
        name = planned.table.full_table_name
        parents = [key.parent for key in plan.foreign_keys.of(name) if key.primary]
        sizes[name] = 1 + sum(sizes.get(parent, 0) for parent in parents)
    return sizes


def _expected_rows(
    plan: Plan, member: PlannedTable | None, parent: Any, names: Mapping[str, str]
) -> QueryExpression:
    """Return the query of the key of all rows that a parent is to have, named as a foreign key names it.

    DataJoint renames no attribute of a subquery on PostgreSQL, so it is done here.
    """
    now, key = renamed(parent, names), parent.primary_key
    to_come = expected_keys(plan, member) if member else now
    if member is None or {*to_come.primary_key} != {*key}:  # make() chooses the rest of it
        return now
    quote, new_names = (
        parent.connection.adapter.quote_identifier,
        {other: name for name, other in names.items()},
    )
    columns = ", ".join(f"{quote(name)} AS {quote(new_names.get(name, name))}" for name in key)
    rows = f"{parent.proj().make_sql(fields=key)} UNION {to_come.make_sql(fields=key)}"
    return as_expression(f"SELECT {columns} FROM ({rows}) AS djdist_rows", now)
