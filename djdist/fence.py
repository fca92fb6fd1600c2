"""The statements by which a worker begins and finishes a job that is still its run's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from djdist.errors import LeaseLostError


class Connection(Protocol):
    """What a statement needs of a worker's connection."""

    def query(self, query: str, args: Any = ()) -> Any:
        """Execute SQL with its ``%s`` filled in and return the cursor."""


@dataclass(frozen=True)
class Statement:
    """SQL with a ``%s`` for each of the names, in their order."""

    sql: str
    names: tuple[str, ...]

    def hits(self, connection: Connection, values: Mapping[str, Any]) -> bool:
        """Execute the statement and tell whether it changed a row."""
        return bool(connection.query(self.sql, args=[values[name] for name in self.names]).rowcount)


@dataclass(frozen=True)
class Fence:
    """Keeps a worker from changing what its run no longer owns.

    Parameters
    ----------
    token : int
        What the run's reservations carry as ``connection_id``.
    begin : Statement
        Notes the worker's host and pid on a reserved job that nobody has begun.
    finish : Statement
        Deletes the job that this worker has begun, or keeps it as a success; belongs into
        ``make()``'s transaction.
    forgo : Statement
        Undoes what ``begin`` noted.
    """

    token: int
    begin: Statement
    finish: Statement
    forgo: Statement

    @property
    def statements(self) -> tuple[Statement, Statement]:
        """All that a worker does to the jobs table."""
        return self.begin, self.finish

    def begins(self, connection: Connection, values: Mapping[str, Any]) -> bool:
        """Mark a job as begun; False if it is no longer the run's, or a worker has begun it before."""
        return self.begin.hits(connection, {**values, "token": self.token})

    def finish_or_undo(self, connection: Connection, values: Mapping[str, Any]) -> None:
        """Finish a job.

        Raises
        ------
        LeaseLostError
            It is no longer the run's, so the transaction has to be undone.
        """
        if not self.finish.hits(connection, {**values, "token": self.token}):
            raise LeaseLostError("the job was taken over by somebody else")

    def forgo_if_begun(self, connection: Connection, values: Mapping[str, Any]) -> None:
        """Undo the beginning of a job that this worker has to leave, so that it costs the key nothing."""
        self.forgo.hits(connection, {**values, "token": self.token})


def key_name(attribute: str) -> str:
    """Name the parameter of a key's attribute, apart from the other parameters."""
    return f"key_{attribute}"
