"""Which of a run's tables a restriction is about."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import datajoint as dj
import pandas as pd
from datajoint.condition import extract_column_names
from datajoint.expression import QueryExpression

from djdist.database.errors import is_infrastructure
from djdist.errors import OptionError

STRING = re.compile(r"'[^']*'")
QUOTED = re.compile(r'"([^"]+)"')


def applicable(restrictions: Iterable[Any], query: QueryExpression) -> tuple[Any, ...]:
    """Return the restrictions that say something of what a query finds, such as a key source."""
    return tuple(restriction for restriction in parted(restrictions) if _applies(restriction, query))


def parted(restrictions: Iterable[Any]) -> list[Any]:
    """Return restrictions all of which are to hold, each for itself."""
    found: list[Any] = []
    for restriction in restrictions:
        found += parted(restriction) if isinstance(restriction, dj.AndList) else [restriction]
    return found


def check_applied(
    restrictions: Iterable[Any], applied: Iterable[Sequence[Any]], names: Iterable[str]
) -> None:
    """Raise OptionError for a restriction that applies to no table of those with these attributes."""
    used = {id(restriction) for of_table in applied for restriction in of_table}
    for restriction in parted(restrictions):
        if id(restriction) not in used:
            raise OptionError(_useless(attributes_of(restriction) or {str(restriction)}, sorted({*names})))


def attributes_of(restriction: Any) -> set[str]:
    """Return the attributes that a restriction names."""
    if isinstance(restriction, dj.Not):
        return attributes_of(restriction.restriction)
    if isinstance(restriction, str):
        return {*extract_column_names(restriction)}
    if isinstance(restriction, Mapping):
        return {str(name).split(".", 1)[0] for name in restriction}
    if fields := getattr(getattr(restriction, "dtype", None), "names", None):  # a record of numpy
        return {*fields}
    if isinstance(restriction, pd.DataFrame):
        return {str(name) for name in [*restriction.index.names, *restriction.columns] if name}
    if isinstance(restriction, type) and issubclass(restriction, QueryExpression):
        restriction = restriction()
    if isinstance(restriction, QueryExpression):
        return {*restriction.primary_key}
    if isinstance(restriction, list | tuple | set):
        return set().union(*map(attributes_of, restriction))
    return set()


def _applies(restriction: Any, query: QueryExpression) -> bool:
    """Return whether it restricts what a query finds: a text by all it names, others by any."""
    if isinstance(restriction, dj.Not):
        return _applies(restriction.restriction, query)
    if isinstance(restriction, dj.AndList):
        return any(_applies(r, query) for r in restriction) and all(
            _applies(r, query) for r in restriction if isinstance(r, str)
        )
    if isinstance(restriction, list | tuple | set):
        return all(_applies(alternative, query) for alternative in restriction)
    if isinstance(restriction, str):
        return _text_applies(restriction, query)
    wanted = attributes_of(restriction)
    return not wanted or bool(wanted & {*query.heading.names})


def _text_applies(condition: str, query: QueryExpression) -> bool:
    """Return whether a condition in SQL names only what a query has.

    DataJoint overlooks names in PostgreSQL's quotes, which may also be those of a subquery's tables: the
    database knows.
    """
    names = {*query.heading.names}
    is_quoting = query.connection.adapter.backend == "postgresql"
    quoted = {*QUOTED.findall(STRING.sub("", condition))} if is_quoting else set[str]()
    return attributes_of(condition) <= names and (quoted <= names or _is_taken(condition, query))


def _is_taken(condition: str, query: QueryExpression) -> bool:
    """Return whether the database takes a condition; it is not asked where a refusal ends a transaction."""
    if query.connection.in_transaction:
        return True
    try:
        query.connection.query(f"SELECT 1 FROM ({(query & condition).make_sql()}) AS taken LIMIT 0")
    except Exception as error:
        if is_infrastructure(error):
            raise
        return False
    return True


def _useless(wanted: set[str], names: Sequence[str]) -> str:
    unknown = sorted(wanted - {*names}) or sorted(wanted)
    near = sorted({match for name in unknown for match in get_close_matches(name, names, n=2)})
    hint = f" Did you mean {' or '.join(near)}?" if near else f" There are: {', '.join(names)}."
    return f"No table of the run can be restricted by {', '.join(unknown)} in its key source.{hint}"
