"""Which rights an account lacks in the database, found out before a job is touched."""

import logging
from collections.abc import Iterator
from typing import Any

import datajoint as dj

from djdist.database.errors import RIGHTS
from djdist.database.job_statements import JobStatements
from djdist.database.sessions import SNAPSHOT_OFF
from djdist.errors import DatabaseError

logger = logging.getLogger(__name__)


def check_key_is_seen(table: Any, query: Any) -> None:
    """Raise DatabaseError where PostgreSQL hides the key of a table, or of what it is made from.

    DataJoint would take each restriction by key for none at all.
    """
    if not query.primary_key and table.connection.adapter.backend == "postgresql":
        whose = table.full_table_name if query is table else f"the key source of {table.full_table_name}"
        raise DatabaseError(
            f"{table.connection.get_user()} can't see the primary key of {whose}: PostgreSQL shows it to "
            "nobody who has no more than SELECT. GRANT REFERENCES, which lets read and change nothing. "
            f"{RIGHTS}"
        )


def lacking_right(table: Any, statements: JobStatements) -> str:
    """Try what each job of a table will need, on no rows, and return what the account may not do."""
    for place, sql, nothing in _trials(table, statements):
        if refusal := _refusal(table.connection, sql, nothing):
            user = table.connection.get_user()
            return f"{user} needs {_verb(sql)} on {place}: {refusal}. {RIGHTS}"
    return ""


def _trials(table: Any, statements: JobStatements) -> Iterator[tuple[str, str, list[None]]]:
    """Return what hits no row: a key of nothing, no rows to insert."""
    for statement in statements.of_one_job:
        yield "its jobs table", statement.sql, [None] * len(statement.names)
    members = [getattr(type(table), name) for name in dir(table) if name[0].isupper()]
    parts = [member() for member in members if isinstance(member, type) and issubclass(member, dj.Part)]
    for filled in (table, *parts):
        yield filled.full_table_name, _vain_insert(filled), []


def _vain_insert(table: Any) -> str:
    names = ", ".join(table.connection.adapter.quote_identifier(name) for name in table.heading.names)
    name = table.full_table_name
    return f"INSERT INTO {name} ({names}) SELECT {names} FROM {name} WHERE 1 = 0"


def _verb(sql: str) -> str:
    return sql.removeprefix(SNAPSHOT_OFF).split()[0]


def _refusal(connection: dj.Connection, sql: str, arguments: list[None]) -> str:
    try:
        connection.query(sql, arguments)
    except dj.errors.AccessError as error:
        return str(error.args[1]).strip()
    except Exception as error:
        logger.debug("The trial of %r failed: %s", sql, error)
    return ""
