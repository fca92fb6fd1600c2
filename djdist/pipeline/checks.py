"""Whether a table can be populated as it was asked for; errors say what to do."""

import inspect
from typing import Any

import datajoint as dj

from djdist.errors import OptionError

PARTS = ("make_fetch", "make_compute", "make_insert")
MAKE = ("make", "_make_tuples", *PARTS)
PRIORITIES = {"mysql": range(-128, 128), "postgresql": range(-32768, 32768)}


def makes_in_parts(table: Any) -> bool:
    """Return whether a table's ``make()`` has three parts, one of them outside of its transaction."""
    return inspect.isgeneratorfunction(table._make_tuples if hasattr(table, "_make_tuples") else table.make)


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
    check_is_auto_populated(table)
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


def check_is_auto_populated(table: Any, name: str = "") -> None:
    """Raise OptionError for what is neither a table that has jobs nor the class of one."""
    kind = table if isinstance(table, type) else type(table)
    if not issubclass(kind, dj.Table) or not issubclass(kind, dj.AutoPopulate):
        name = name or kind.__name__
        raise OptionError(f"{name} is not a dj.Computed or dj.Imported table, so it has no jobs to make.")


def check_has_schema(table: Any, name: str = "") -> None:
    """Raise OptionError for a table, or the class of one, that was never declared."""
    if table._connection is None or not table.database:
        name = name or type(table).__name__
        raise OptionError(f"{name} belongs to no schema yet: put @schema above it, and activate the schema.")


def check_priority(table: dj.Table, priority: int | None) -> None:
    """Raise OptionError for a priority that the jobs table can't hold."""
    allowed = PRIORITIES[table.connection.adapter.backend]
    if priority is not None and priority not in allowed:
        raise OptionError(
            f"priority={priority!r} does not fit the jobs table: use a whole number from {allowed[0]} to "
            f"{allowed[-1]} (the smaller, the more urgent). It may come from dj.config.jobs.default_priority."
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
