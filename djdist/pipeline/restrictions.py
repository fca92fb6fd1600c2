"""Which of a run's tables a restriction is about."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import datajoint as dj
import pandas as pd
from datajoint.condition import extract_column_names
from datajoint.expression import QueryExpression

from djdist.errors import OptionError


def applicable(restrictions: Iterable[Any], names: Iterable[str]) -> tuple[Any, ...]:
    """Return the restrictions that say something of a table with attributes of these names."""
    known = {*names}
    return tuple(restriction for restriction in parted(restrictions) if _applies(restriction, known))


def parted(restrictions: Iterable[Any]) -> list[Any]:
    """Return restrictions all of which are to hold, each for itself."""
    found: list[Any] = []
    for restriction in restrictions:
        found += parted(restriction) if isinstance(restriction, dj.AndList) else [restriction]
    return found


def check_applied(restrictions: Iterable[Any], names_of_tables: Iterable[Iterable[str]]) -> None:
    """Raise OptionError for a restriction that none of some tables has the attributes for."""
    tables = [{*names} for names in names_of_tables]
    for restriction in parted(restrictions):
        if not any(_applies(restriction, names) for names in tables):
            raise OptionError(_useless(attributes_of(restriction), sorted(set().union(*tables))))


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


def _applies(restriction: Any, names: set[str]) -> bool:
    """Return whether it restricts a table with these attributes: a text by all it names, others by any."""
    if isinstance(restriction, dj.Not):
        return _applies(restriction.restriction, names)
    if isinstance(restriction, dj.AndList):
        return any(_applies(r, names) for r in restriction) and all(
            _applies(r, names) for r in restriction if isinstance(r, str)
        )
    if isinstance(restriction, list | tuple | set):
        return all(_applies(alternative, names) for alternative in restriction)
    wanted = attributes_of(restriction)
    if isinstance(restriction, str):
        return wanted <= names
    return not wanted or bool(wanted & names)


def _useless(wanted: set[str], names: Sequence[str]) -> str:
    unknown = sorted(wanted - {*names}) or sorted(wanted)
    near = sorted({match for name in unknown for match in get_close_matches(name, names, n=2)})
    hint = f" Did you mean {' or '.join(near)}?" if near else f" There are: {', '.join(names)}."
    return f"No table of the run can be restricted by {', '.join(unknown)} in its key source.{hint}"
