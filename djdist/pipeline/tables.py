"""Auto-populated tables by name: those of a module, or ``my_pipeline:Table``."""

import sys
from contextlib import redirect_stdout
from importlib import import_module
from types import ModuleType
from typing import Any

import datajoint as dj

from djdist.database.errors import is_infrastructure, is_refused_login
from djdist.errors import DatabaseError, OptionError
from djdist.pipeline.checks import check_has_schema, check_is_auto_populated
from djdist.pipeline.targets import classes_of


def tables_of(module: ModuleType) -> list[Any]:
    """Return a module's auto-populated tables, in the order of their definition.

    Raises
    ------
    OptionError
        There are none.
    """
    tables = classes_of(module)
    if not tables:
        raise OptionError(
            f"{module.__name__} has no dj.Computed or dj.Imported tables whose schema is activated. "
            "Name the module that defines them, or one that imports them."
        )
    return tables


def tables_named(name: str) -> list[Any]:
    """Return what ``my_pipeline:Table`` names, or all auto-populated tables of ``my_pipeline``.

    Raises
    ------
    OptionError
        There is no such module, it can't be imported, or it has no such table.
    DatabaseError
        The database that the module wants can't be reached.
    """
    module_name, _, table_name = name.partition(":")
    module = imported(module_name)
    if not table_name:
        return tables_of(module)
    if not hasattr(module, table_name):
        names = ", ".join(table.__name__ for table in tables_of(module))
        raise OptionError(f"{module_name} has no table {table_name}. Its auto-populated tables are: {names}.")
    return [_checked(getattr(module, table_name), name)]


def _checked(table: Any, name: str) -> Any:
    check_is_auto_populated(table, name)
    check_has_schema(table, name)
    return table if isinstance(table, type) else type(table)


def imported(name: str) -> ModuleType:
    """Import a module, whose own output is kept apart from what a program writes."""
    try:
        with redirect_stdout(sys.stderr):
            return import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise OptionError(
                f"There is no module {name!r} in this folder or installed. Write it as in an import: "
                "my_pipeline for my_pipeline.py, my_lab.ephys for my_lab/ephys.py."
            ) from error
        what = f"{type(error).__name__}: {error}".rstrip("?. \n")
        if is_refused_login(error):
            database = dj.config.database
            raise DatabaseError(
                f"The database of {name} at {database.host}:{database.port} refuses the login of "
                f"{database.user}: {what}. Set DJ_USER and DJ_PASS, or dj.config.database."
            ) from error
        if is_infrastructure(error):
            raise DatabaseError(
                f"{name} can't reach its database: {what}. See that it runs and that DJ_HOST, or "
                "dj.config.database, names it."
            ) from error
        raise OptionError(
            f"{name} can't be imported: {what}. `python -c 'import {name}'` shows where."
        ) from error
