"""Tables and jobs as the command line names them."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import datajoint as dj

from djdist.database.errors import is_infrastructure
from djdist.errors import OptionError
from djdist.jobs.table import jobs_to_look_at
from djdist.pipeline.connection import reconnect
from djdist.pipeline.key_sources import query_of
from djdist.pipeline.restrictions import applicable
from djdist.pipeline.tables import imported, tables_named
from djdist.shipping.packing import is_alive


def all_tables(names: Sequence[str]) -> list[Any]:
    """Return the tables of some names, each once."""
    return list(dict.fromkeys(table for name in names for table in tables_named(name)))


def one_table(name: str) -> Any:
    """Return the table of a name.

    Raises
    ------
    OptionError
        It names a module only, or no such table.
    """
    if ":" not in name:
        names = ", ".join(f"{name}:{table.__name__}" for table in tables_named(name))
        raise OptionError(f"Which table of {name}? There are: {names}.")
    return tables_named(name)[0]


def parted(name: str, more: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Part names of modules and tables from the restrictions that follow them."""
    rest = [name, *(more or ())]
    count = next((n for n, given in enumerate(rest) if n and not _is_name(given)), len(rest))
    return rest[:count], rest[count:]


def targets_of(names: Sequence[str]) -> list[Any]:
    """Return the modules and tables of some names, of which a module may have nothing to populate."""
    return [tables_named(name)[0] if ":" in name else imported(name) for name in names]


def reconnected(tables: list[Any]) -> list[Any]:
    """Return tables, with new connections for those that were lost."""
    for table in tables:
        if not is_alive(table.connection):
            reconnect(table.connection)
    return tables


def check(table: Any, restrictions: Sequence[str]) -> None:
    """Check a restriction of keys with the database, before anything is changed."""
    _tried(lambda: _todo(table, restrictions), restrictions)


def jobs_of_keys(table: Any, restrictions: Sequence[Any]) -> Any:
    """Return the jobs of the keys that a call of populate() was about."""
    jobs = table.jobs
    return jobs.restrict(_todo(table, restrictions).proj(), semantic_check=False) if restrictions else jobs


def jobs_meant(name: str, more: Sequence[str] | None) -> tuple[list[Any], list[str]]:
    """Return the jobs of tables and modules, and the conditions that follow their names.

    Of several tables those are left out that a condition can't be about.
    """
    names, conditions = parted(name, more)
    found = [jobs_to_look_at(table) for table in all_tables(names)]
    if len(found) == 1:
        return found, conditions
    fitting = [j for j in found if j.is_declared and len(applicable(conditions, j)) == len(conditions)]
    return fitting or found, conditions


def jobs_seen(table: Any, restrictions: Sequence[str] | None) -> Any:
    """Return jobs to look at; there are none to restrict before the jobs table is declared."""
    jobs = jobs_to_look_at(table)
    return restricted(jobs, restrictions) if jobs.is_declared else jobs


def restricted(jobs: Any, restrictions: Sequence[str] | None) -> Any:
    """Choose some of a table's jobs.

    Raises
    ------
    OptionError
        The database refuses the restriction.
    """
    return _tried(lambda: jobs & dj.AndList(restrictions), restrictions) if restrictions else jobs


def line_of(error: Exception) -> str:
    """Write an error in one line."""
    text = error.args[0] if isinstance(error, dj.DataJointError) and error.args else error
    return " ".join(str(text).split())


def _is_name(given: str) -> bool:
    """Return whether an argument names a module or a table: a restriction is seldom a single word."""
    module, _, table = given.partition(":")
    words = [*module.split("."), *([table] if table else [])]
    return all(map(str.isidentifier, words)) and (bool(table) or find_spec(words[0]) is not None)


def _tried(query: Callable[[], Any], restrictions: Sequence[str] | None) -> Any:
    try:
        bool(query() & dj.Top(limit=1))
    except Exception as error:
        if not restrictions or is_infrastructure(error):
            raise
        raise OptionError(f"{' AND '.join(restrictions)!r} is no restriction: {line_of(error)}") from error
    return query()


def _todo(table: Any, restrictions: Sequence[Any]) -> Any:
    return query_of(table() if isinstance(table, type) else table) & dj.AndList(restrictions)
