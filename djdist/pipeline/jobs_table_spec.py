"""What a job store is told of the table whose jobs it keeps."""

from dataclasses import dataclass

from djdist.database.dbapi import ConnectionSettings

PARENTS = "'the parents' = 'the parents'"
"""Stands in SQL where a condition on the parents belongs; as it is, it holds for all of them."""


@dataclass(frozen=True)
class Following:
    """How keys are found that come of a parent's jobs.

    ``sql`` has ``PARENTS`` in place of the condition that ``columns``, which are quoted, are what the
    parent's jobs have as ``names``; ``uuids`` are those of the names that are binary. ``jobs_table``
    is the parent's, in full, where there is one.
    """

    parent: str
    columns: tuple[str, ...]
    names: tuple[str, ...]
    uuids: frozenset[str]
    sql: str
    jobs_table: str | None = None


@dataclass(frozen=True)
class KeysSpec:
    """The keys of a table that a run without a jobs table makes.

    ``missing_keys_sql`` finds those without row, in the order of DataJoint's own ``populate()``; ``follows``
    and ``held_back`` are as in a :class:`JobsTableSpec`.
    """

    settings: ConnectionSettings
    table: str
    schema: str
    key: tuple[str, ...]
    uuids: frozenset[str]
    missing_keys_sql: str
    follows: tuple[Following, ...] = ()
    held_back: tuple[Following, ...] = ()

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}"


@dataclass(frozen=True)
class JobsTableSpec:
    """Where a jobs table is and the queries that say which keys it should hold.

    ``restricted_sql`` is None where a call has no restrictions; ``new_keys_sql`` finds the keys
    without row and job; ``several_keys_per_job`` tells that several keys of the key source may fall on
    one job, ``keep_completed`` that jobs stay as successes; ``time_zone`` is the server's, where
    PostgreSQL has to be told it.

    ``follows`` find the keys, without row and job, of jobs that a table upstream has just made. There may be
    several of one, by several foreign keys. ``held_back`` count the keys that are to come of an
    upstream table's failed jobs.
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
    follows: tuple[Following, ...] = ()
    held_back: tuple[Following, ...] = ()

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}"
