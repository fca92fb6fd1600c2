"""What djdist asks of the database's sessions: of its own, and of those in which keys are made.

Its own keep the time zone of the server, whatever the account or the client (``PGTZ``) sets: jobs
tables hold times without a zone, which all runs and native workers compare with their own. A session
in which ``make()`` runs keeps the zone that it has natively.
"""

from datetime import datetime
from typing import Any

READ_COMMITTED = "READ COMMITTED"
"""PostgreSQL's own default; in a stricter one no job could be finished whose lease was renewed since."""

SNAPSHOT_OFF = "/*M!110602 SET STATEMENT innodb_snapshot_isolation = OFF FOR */"
"""Lets MariaDB 11.6.2 and newer lock a row that has changed since the transaction began, such as a job
whose lease was renewed; a comment for all others."""

TIME_ZONE = {
    "mysql": "@@GLOBAL.time_zone",
    # the account's or the client's setting hides the server's, whose log mostly has the same
    "postgresql": """(
        SELECT CASE WHEN source IN ('client', 'user', 'database user', 'session') THEN coalesce(
            (SELECT split_part(setting, '=', 2) FROM pg_db_role_setting, unnest(setconfig) AS setting
             WHERE setrole = 0 AND lower(split_part(setting, '=', 1)) = 'timezone' AND setdatabase IN
                 (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
             ORDER BY setdatabase DESC LIMIT 1),
            current_setting('log_timezone')) ELSE reset_val END
        FROM pg_settings WHERE name = 'TimeZone')""",
}
"""SQL of the server's time zone, by backend."""

IDLE_LIMITS = {
    "mysql": "SELECT 'wait_timeout', @@wait_timeout",
    "postgresql": """
        SELECT name, setting::float / 1000 FROM pg_settings WHERE setting <> '0' AND name IN
            ('idle_in_transaction_session_timeout', 'transaction_timeout', 'idle_session_timeout')""",
}
"""SQL of the settings by which a server ends sessions that ask nothing, in seconds; nobody is told of it."""

PREPARE = {
    "mysql": f"SET SESSION time_zone = {TIME_ZONE['mysql']}",
    "postgresql": f"SELECT set_config('TimeZone', {TIME_ZONE['postgresql']}, false)",
}


def prepare(connection: Any, backend: str) -> None:
    """Prepare a session of djdist's own, given as the connection of the database's driver."""
    connection.cursor().execute(PREPARE[backend])


def server_now(connection: Any) -> datetime:
    """Ask for the server's local time by a DataJoint connection."""
    now: datetime = connection.query(f"SELECT {server_time(connection.adapter.backend)}").fetchone()[0]
    return now


def server_time(backend: str, time_zone: str | None = None) -> str:
    """Return SQL for the server's local time, in sessions that may have another time zone."""
    if backend == "mysql":
        return f"CONVERT_TZ(UTC_TIMESTAMP(3), '+00:00', {TIME_ZONE['mysql']})"
    zone = f"'{time_zone}'" if time_zone else TIME_ZONE["postgresql"]
    return f"(clock_timestamp() AT TIME ZONE {zone})::timestamp(3)"
