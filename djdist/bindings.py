"""Which schemas tables are bound to: what a worker has to know of it beside what modules say."""

import sys
from collections.abc import Iterator

import datajoint as dj

Binding = tuple[str, str, str]


def bindings() -> list[Binding]:
    """List the tables that were bound to a schema after their module was imported."""
    return [(t.__module__, t.__qualname__, t.database) for t in tables(dj.Table) if _is_bound_master(t)]


def bind(module: str, name: str, database: str) -> None:
    """Bind a table to its schema, if importing its module didn't."""
    table = getattr(sys.modules.get(module), name, None)
    if table is not None and table.database is None:
        schema = dj.Schema(database, create_schema=False, create_tables=False)
        schema(table, context=vars(sys.modules[module]))


def register(connection: dj.Connection, schemas: list[str]) -> None:
    """Let ``self.upstream`` find the schemas that the caller's connection knows."""
    for name in schemas:
        if name not in connection.schemas:
            schema = dj.Schema(connection=connection)
            schema.database = name
            connection.register(schema)


def tables(base: type[dj.Table]) -> Iterator[type[dj.Table]]:
    """Give all classes of tables below one."""
    for table in base.__subclasses__():
        yield table
        yield from tables(table)


def _is_bound_master(table: type[dj.Table]) -> bool:
    importable = getattr(sys.modules.get(table.__module__), table.__name__, None) is table
    return importable and table.__module__ != "__main__" and isinstance(table.__dict__.get("database"), str)
