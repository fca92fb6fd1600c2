"""What a job store is told of the table whose jobs it keeps."""

from dataclasses import dataclass

from djdist.database.dbapi import ConnectionSettings


@dataclass(frozen=True)
class JobsTableSpec:
    """Where a jobs table is and the queries that say which keys it should hold.

    ``restricted_sql`` is None where a call has no restrictions; ``new_keys_sql`` finds the keys
    without row and job; ``several_keys_per_job`` tells that several keys of the key source may fall on
    one job, ``keep_completed`` that jobs stay as successes; ``time_zone`` is the server's, where
    PostgreSQL has to be told it.
    """

    settings: ConnectionSettings
    table: str
    schema: str
    jobs_table: str
    target_table: str
    key: tuple[str, ...]
    uuids: frozenset[str]
    several_keys_per_job: bool
    target_key: tuple[str, ...]
    key_source_sql: str
    restricted_sql: str | None
    new_keys_sql: str
    keep_completed: bool = False
    time_zone: str | None = None

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}"
