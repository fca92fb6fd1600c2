"""What a job store is told of the table whose jobs it keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from djdist.database.dbapi import ConnectionSettings


@dataclass(frozen=True)
class KeysQuery:
    """A query of keys that come of those of a table upstream.

    ``attributes`` pairs columns of it with attributes of the upstream table's key, by which it is restricted
    to what comes of some keys. It has to be one that the servers restrict before they read all.
    """

    sql: str
    attributes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class KeySourceSpec:
    """Where a table is and the query that says which of its keys are new.

    ``new_keys_sql`` finds those without row and job, for a run without jobs table in DataJoint's order;
    ``follows`` finds the new ones among those that come of keys of a table upstream, given by its name in
    the run, by each way that leads there; ``held_back`` finds those that can't be made for its errors.
    ``uuids`` are columns that hold a uuid in binary.
    """

    settings: ConnectionSettings
    table: str
    schema: str
    key: tuple[str, ...]
    uuids: frozenset[str]
    new_keys_sql: str
    follows: Mapping[str, tuple[KeysQuery, ...]] = field(default_factory=dict, kw_only=True)
    held_back: Mapping[str, KeysQuery] = field(default_factory=dict, kw_only=True)

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}"


@dataclass(frozen=True)
class JobsTableSpec(KeySourceSpec):
    """Where a jobs table is and the queries that say which keys it should hold.

    ``restricted_sql`` is None where a call has no restrictions; ``several_keys_per_job`` tells that
    several keys of the key source may fall on one job, ``keep_completed`` that jobs stay as successes;
    ``time_zone`` is the server's, where PostgreSQL has to be told it.
    """

    jobs_table: str
    target_table: str
    several_keys_per_job: bool
    target_key: tuple[str, ...]
    key_source_sql: str
    restricted_sql: str | None
    keep_completed: bool = False
    time_zone: str | None = None
