"""SQL that both servers understand, each in its own words."""

from collections.abc import Iterable
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

NOW: sa.ColumnElement[Any] = sa.literal_column("CURRENT_TIMESTAMP(3)")
"""In milliseconds, as DataJoint's columns hold moments. SQLAlchemy's own ``now()`` means whole seconds on
MySQL, by which a job that has just been added is not due yet."""


class BinaryUuid(sa.types.TypeDecorator[UUID]):
    """A uuid as DataJoint keeps it on MySQL: binary(16)."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: UUID | None, dialect: sa.Dialect) -> bytes | None:
        return None if value is None else value.bytes

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> UUID | None:
        return None if value is None else UUID(bytes=value)


class shifted(FunctionElement[Any]):  # noqa: N801 - reads as an SQL function
    """A moment and the seconds to add to it."""

    inherit_cache = True


@compiles(shifted, "mysql", "mariadb")
def _shifted_in_mysql(element: shifted, compiler: SQLCompiler, **kw: Any) -> str:
    moment, seconds = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"({moment} + INTERVAL ({seconds}) SECOND)"


@compiles(shifted, "postgresql")
def _shifted_in_postgresql(element: shifted, compiler: SQLCompiler, **kw: Any) -> str:
    moment, seconds = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"({moment} + make_interval(secs => {seconds}))"


def in_seconds(seconds: Any) -> sa.ColumnElement[Any]:
    """Return the moment that is some seconds from now, by the database's clock."""
    return shifted(NOW, seconds if isinstance(seconds, sa.ColumnElement) else sa.literal(seconds))


def without_index(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """Return a column's value, hidden from the optimizer, so that it finds jobs by their primary key.

    By the index on status it would lock other jobs on its way, and in another order than workers do,
    who lock one job after the other by its key: the two would wait for each other.
    """
    return sa.func.concat(column)


def same_key(some: sa.FromClause, others: sa.FromClause, key: Iterable[str]) -> sa.ColumnElement[bool]:
    """Return the condition that rows of two tables have the same key."""
    return sa.and_(*[some.c[name] == others.c[name] for name in key])


def verbatim(sql: str) -> sa.TextClause:
    """Return SQL as it is, though it has colons, which SQLAlchemy would take for parameters."""
    return sa.text(sql.replace(":", "\\:"))
