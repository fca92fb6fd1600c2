"""Marks of sessions, by which what a dead worker has left behind is found, and ended with its locks.

A mark is a lock of the server under a name. It goes with its session, which therefore can't be taken for
another one that has got its number.
"""

from hashlib import sha256

MARK = {
    "mysql": "SELECT GET_LOCK('djdist {0}', 0) FROM DUAL WHERE CONNECTION_ID() = %s",
    "postgresql": "SELECT pg_try_advisory_lock({0}) WHERE pg_backend_pid() = %s",
}
"""Not through a pooler, whose sessions have numbers of its own and serve many clients."""

UNMARK = {
    "mysql": "SELECT RELEASE_LOCK('djdist {0}')",
    "postgresql": "SELECT pg_advisory_unlock({0})",
}

BEARERS = {
    "mysql": "SELECT IS_USED_LOCK('djdist {0}')",
    "postgresql": "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 "
    "AND classid::bigint << 32 | objid::bigint = {0} "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
}
END = {"mysql": "KILL {0}", "postgresql": "SELECT pg_terminate_backend({0})"}


def number_of(name: str) -> int:
    """Return the number of a lock by its name; PostgreSQL's have numbers only."""
    return int.from_bytes(sha256(name.encode()).digest()[:7], "big")


def worker_mark(token: int, host: str, pid: int) -> int:
    """Return the mark of the worker that has begun a run's job, as the jobs table names both."""
    return number_of(f"worker {token} {host} {pid}")
