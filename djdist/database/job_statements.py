"""The statements by which a worker begins and finishes a job that is still its run's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Protocol
from uuid import UUID

from djdist.errors import LeaseLostError


class Connection(Protocol):
    """What a statement needs of a worker's connection."""

    def query(self, query: str, args: Any = ()) -> Any:
        """Execute SQL with its ``%s`` filled in and return the cursor."""


Values = Mapping[str, Any]


@dataclass(frozen=True)
class Statement:
    """SQL with a ``%s`` for each of the names, in their order."""

    sql: str
    names: tuple[str, ...]

    def arguments(self, values: Values) -> list[Any]:
        """Return what belongs in the SQL."""
        return [values[name] for name in self.names]


@dataclass(frozen=True)
class JobStatements:
    """Keeps a worker from changing what its run no longer owns.

    Parameters
    ----------
    token : int
        What the run's reservations carry as ``connection_id``.
    key : Statement
        The condition that finds one job; the others find jobs of the run.
    key_columns : str
        The row of columns that ``key`` compares, which is searched for many jobs.
    begin : Statement
        Notes the worker's host and pid on reserved jobs that nobody has begun.
    held : Statement
        Selects jobs that this worker has begun.
    made : Statement
        Selects those of them whose key is in the table.
    hand_back : Statement
        Undoes what ``begin`` noted.
    finish : Statement
        Deletes jobs that this worker has begun, or keeps them as successes; belongs into
        ``make()``'s transaction.
    """

    token: int
    key: Statement
    key_columns: str
    begin: Statement
    held: Statement
    made: Statement
    hand_back: Statement
    finish: Statement

    @property
    def of_one_job(self) -> tuple[Statement, Statement]:
        """All that a worker does to the jobs table, each for one job."""
        return self._of_one(self.begin), self.finish_one

    @cached_property
    def finish_one(self) -> Statement:
        """Finishes one job."""
        return self._of_one(self.finish)

    def _of_one(self, statement: Statement) -> Statement:
        return Statement(f"{statement.sql} AND {self.key.sql}", statement.names + self.key.names)

    def begins(self, connection: Connection, jobs: Sequence[Values]) -> list[bool]:
        """Mark jobs as begun; False for what is no longer the run's, or was begun by a worker before."""
        hits = self._execute(connection, self.begin, jobs)
        if hits in (0, len(jobs)):
            return [bool(hits)] * len(jobs)
        return [bool(self._execute(connection, self.held, [job])) for job in jobs]

    def any_made(self, connection: Connection, jobs: Sequence[Values]) -> bool:
        """Return whether the key of any of these jobs, which this worker has begun, is in the table."""
        return bool(self._execute(connection, self.made, jobs))

    def holds(self, connection: Connection, job: Values) -> bool:
        """Return whether a job that this worker has begun is still to be finished.

        It waits for a transaction that is finishing the job, be it one whose connection is gone.
        """
        return bool(self._execute(connection, self.held, [job], " FOR UPDATE"))

    def finish_or_undo(self, connection: Connection, values: Values) -> None:
        """Finish a job.

        Raises
        ------
        LeaseLostError
            It is no longer the run's, so the transaction has to be undone.
        """
        arguments = self.finish_one.arguments({**values, "token": self.token})
        if not connection.query(self.finish_one.sql, args=arguments).rowcount:
            raise LeaseLostError("the job was taken over by somebody else")

    def finish_all_or_undo(self, connection: Connection, jobs: Sequence[Values]) -> None:
        """Finish the jobs of a shared transaction, by one statement.

        Raises
        ------
        LeaseLostError
            Some are no longer the run's, so the transaction has to be undone.
        """
        if self._execute(connection, self.finish, jobs) != len(jobs):
            raise LeaseLostError("the job was taken over by somebody else")

    def hand_back_begun(self, connection: Connection, jobs: Sequence[Values]) -> None:
        """Undo the beginning of jobs that this worker has to leave, so that it costs the keys nothing."""
        self._execute(connection, self.hand_back, jobs)

    def _execute(
        self, connection: Connection, statement: Statement, jobs: Sequence[Values], ending: str = ""
    ) -> int:
        """Execute one statement for all these jobs of one worker."""
        arguments = statement.arguments({**jobs[0], "token": self.token})
        arguments += [argument for values in jobs for argument in self.key.arguments(values)]
        sql = f"{statement.sql} AND ({self._among(jobs)}){ending}"
        return int(connection.query(sql, args=arguments).rowcount)

    def _among(self, jobs: Sequence[Values]) -> str:
        """Return the condition that finds jobs by their key, in the form that the job store uses, too."""
        keys = [self.key.arguments(values) for values in jobs]
        if not are_searched_as_list(keys):
            return " OR ".join([self.key.sql] * len(keys))
        row = ", ".join(["%s"] * len(keys[0]))
        return f"{self.key_columns} IN ({', '.join([f'({row})'] * len(keys))})"


def are_searched_as_list(keys: Sequence[Sequence[Any]]) -> bool:
    """Return whether jobs are found by a list of their keys, not by each for itself.

    MariaDB scans the whole table for a list of one tuple.
    """
    return len(keys) > 1 and not any(map(_is_other_in_list, chain.from_iterable(keys)))


def _is_other_in_list(value: object) -> bool:
    """Return whether PostgreSQL rounds a value in a list, or MariaDB doesn't find it in a latin1 column."""
    return isinstance(value, float) or (isinstance(value, str) and not value.isascii())


def key_values(key: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """Return a key's values as the database's driver takes them, by the names of their parameters."""
    binary = backend == "mysql"
    return {key_name(k): v.bytes if binary and isinstance(v, UUID) else v for k, v in key.items()}


def key_name(attribute: str) -> str:
    """Return the name of a key attribute's parameter, which no other parameter has."""
    return f"key_{attribute}"
