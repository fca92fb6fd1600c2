"""What must be true after a run whatever happened to it, asked in plain SQL over a connection of its own."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from lab.notes import made_twice_at_once
from servers import Server

SAME_KEY = "{0}.subject_id = t.subject_id AND {0}.session_date = t.session_date"
NOT_ONCE = (
    "SELECT s.n, count(t.subject_id), count(j.status) FROM {session} s"
    " LEFT JOIN {noted} t ON " + SAME_KEY.format("s") + " LEFT JOIN {jobs} j ON j.status = 'error'"
    " AND j.subject_id = s.subject_id AND j.session_date = s.session_date"
    " GROUP BY s.n HAVING count(t.subject_id) + count(j.status) <> 1"
)
INCOMPLETE = (
    "SELECT t.subject_id, t.session_date, count(p.item) FROM {noted} t"
    " LEFT JOIN {part} p ON " + SAME_KEY.format("p") + " GROUP BY t.subject_id, t.session_date, t.total"
    " HAVING count(p.item) <> 3 OR sum(p.value) <> t.total"
)
UNDONE = "SELECT status, count(*) FROM {jobs} WHERE status <> 'error' GROUP BY status"
PENDING = "SELECT count(*) FROM {jobs} WHERE status = 'pending'"
COUNTS = (
    "SELECT (SELECT count(*) FROM {noted}), count(*),"
    " coalesce(sum(CASE WHEN error_message LIKE 'ValueError: bad n%' THEN 0 ELSE 1 END), 0) FROM {jobs}"
)
CONNECTIONS = {
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE user = '{user}'",
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE usename = '{user}'",
}


def violations(server: Server, schema: str, folder: Path, *, overlaps: bool = True) -> list[str]:
    """Say what is wrong with the table Noted; nothing in the best case.

    Without `overlaps`, one key made twice at the same time is forgiven.
    """
    found = [
        f"session {n}: {rows} results, {errors} errors" for n, rows, errors in ask(server, schema, NOT_ONCE)
    ]
    found += [f"{key} has {parts} parts" for *key, parts in ask(server, schema, INCOMPLETE)]
    found += [f"{jobs} jobs left {status}" for status, jobs in ask(server, schema, UNDONE)]
    return found + [f"{mark} at once" for mark in made_twice_at_once(folder) if overlaps]


def pending(server: Server, schema: str) -> int:
    ((count,),) = ask(server, schema, PENDING)
    return int(count)


def counts(server: Server, schema: str) -> tuple[int, int, int]:
    """Count results, errors, and errors that are not those of make()."""
    ((made, errors, strange),) = ask(server, schema, COUNTS)
    return int(made), int(errors), int(strange)


def connections(server: Server) -> int:
    """Count the server's connections, without the one that asks."""
    ((count,),) = ask(server, "", CONNECTIONS[server.backend].format(user=server.user))
    return int(count) - 1


def ask(server: Server, schema: str, query: str) -> list[tuple[Any, ...]]:
    quote = "`" if server.backend == "mysql" else '"'
    names = {"session": "session", "noted": "__noted", "part": "__noted__item", "jobs": "~~noted"}
    tables = {k: f"{quote}{schema}{quote}.{quote}{name}{quote}" for k, name in names.items()}
    with closing(_connect(server)) as connection, closing(connection.cursor()) as cursor:
        cursor.execute(query.format(**tables))
        return list(cursor.fetchall())


def _connect(server: Server) -> Any:
    account: dict[str, Any] = {
        "host": server.host,
        "port": server.port,
        "user": server.user,
        "password": server.password,
    }
    if server.backend == "mysql":
        import pymysql

        return pymysql.connect(**account)
    import psycopg2

    return psycopg2.connect(dbname=server.database_name, **account)
