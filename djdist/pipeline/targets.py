"""Which tables a call is about: those of modules, of schemas, of lists, or one."""

import re
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import datajoint as dj
from datajoint.utils import to_camel_case

from djdist.errors import OptionError
from djdist.pipeline.checks import check_has_schema, has_make

AUTOMATIC = (dj.Computed, dj.Imported)


def tables_meant(target: Any) -> list[Any]:
    """Return the auto-populated tables of a target, and a table that it names itself, as instances.

    Raises
    ------
    OptionError
        It is nothing that has tables, a Part table, or a schema's table whose class isn't imported.
    """
    if isinstance(target, list | tuple | set):
        return [table for one in target for table in tables_meant(one)]
    if isinstance(target, ModuleType):
        return [table() for table in classes_of(target)]
    if isinstance(target, dj.Schema):
        return list(_tables_of_schema(target))
    return [_checked(target() if isinstance(target, type) and issubclass(target, dj.Table) else target)]


def classes_of(module: ModuleType) -> list[Any]:
    """Return the auto-populated tables of a module, each once, in the order of their definition."""
    return list(dict.fromkeys(known_class(value) for value in vars(module).values() if _is_declared(value)))


def is_table(target: Any) -> bool:
    """Return whether a target is one table, its class or an instance."""
    return isinstance(target, dj.Table) or (isinstance(target, type) and issubclass(target, dj.Table))


def holds_tables(target: Any) -> bool:
    """Return whether a target is a module or a schema, for all of its tables."""
    return isinstance(target, ModuleType | dj.Schema)


def class_of(connection: Any, full_table_name: str) -> Any | None:
    """Return the class of an auto-populated table, if some imported module has it; one with a make first."""
    found = [
        cls
        for cls in _subclasses(dj.AutoPopulate)
        if _is_declared(cls) and cls.connection is connection and cls.full_table_name == full_table_name
    ]
    return max(found, key=_preference, default=None)


def known_class(table: Any) -> Any:
    """Return the class that makes the rows of a table, which a virtual module's classes don't."""
    return table if has_make(table()) else class_of(table.connection, table.full_table_name) or table


def names_in_schema(schema: str, connection: Any) -> Iterator[str]:
    """Return what the auto-populated tables of a schema are called: by classes, at last in the database."""
    for cls in _subclasses(dj.AutoPopulate):
        if _is_declared(cls) and cls.connection is connection and cls.database == schema:
            yield from (cls.__name__, cls.table_name)
    for row in connection.query(connection.adapter.list_tables_sql(schema)):
        if is_automatic(row[0]):
            yield from (to_camel_case(row[0].lstrip("_")), row[0])


def is_automatic(table_name: str) -> bool:
    """Return whether a table without its schema's name is of the kinds that are populated."""
    return any(_fits(kind, table_name) for kind in AUTOMATIC)


def _tables_of_schema(schema: dj.Schema) -> Iterator[Any]:
    for name in filter(is_automatic, schema.list_tables()):
        full_name = schema.connection.adapter.make_full_table_name(schema.database, name)
        found = class_of(schema.connection, full_name)
        if found is None:
            raise OptionError(unknown_class(full_name))
        yield found()


def unknown_class(full_table_name: str) -> str:
    return (
        f"No class of {full_table_name} with a make() is known here: import the module that defines it, "
        "or name the tables that you mean."
    )


def _checked(table: Any) -> Any:
    if isinstance(table, dj.Part):
        raise OptionError(
            f"{type(table).__name__} is a Part table, whose rows its master makes: name "
            f"{type(table).master.__name__}."
        )
    if not isinstance(table, dj.Table):
        raise OptionError(
            f"{table!r} can't be populated: name a module, a dj.Schema, a table, or a list of these."
        )
    check_has_schema(table)
    return table


def _is_declared(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, AUTOMATIC) and bool(getattr(value, "database", None))


def _subclasses(cls: Any) -> Iterator[Any]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _preference(cls: Any) -> tuple[bool, bool]:
    """Prefer classes that make rows, then those that a module has, not one that it had before a reload."""
    module = sys.modules.get(cls.__module__)
    return has_make(cls()), getattr(module, cls.__name__, None) is cls


def _fits(kind: Any, table_name: str) -> bool:
    return re.fullmatch(kind.tier_regexp, table_name) is not None


def names_of(tables: Iterable[Any]) -> list[str]:
    """Return the names of tables in a run, with schemas where the names alone are ambiguous."""
    short = [type(table).__name__ for table in tables]
    return [
        name if short.count(name) == 1 else f"{table.database}.{name}"
        for name, table in zip(short, tables, strict=True)
    ]
