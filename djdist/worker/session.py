"""What a worker executes on DataJoint's connection, but not through DataJoint."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import uuid4

from djdist.database.watchdog import Waiting

Translated = Callable[[Exception, str], Exception]
"""Gives DataJoint's error for the driver's."""

COMMIT_AND_CHAIN = "COMMIT AND CHAIN"
DIVISION_BY_ZERO = "22012"
IDLE_IN_POSTGRESQL = 0
IN_TRANSACTION_IN_MYSQL = 1
"""A bit of the status that comes with each of the server's answers."""

NO_HIT = "djdist: no job was hit"
NOT_PREPARED = {1461, 1295, 1064}
"""Too many are prepared already; the server prepares no such statement; or a proxy does not know it."""
COMMIT_OR_SIGNAL = (
    "BEGIN NOT ATOMIC {}; "
    f"IF ROW_COUNT() = 0 THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = '{NO_HIT}'; END IF; "
    f"{COMMIT_AND_CHAIN}; END"
)


def _untranslated(error: Exception, _: str) -> Exception:
    return error


class Session:
    """Executes statements without what DataJoint does for each: look for warnings, and reconnect.

    Parameters
    ----------
    connection : pymysql.Connection or psycopg2.extensions.connection
        The connection of the database's driver.
    translated : callable, optional
        Gives DataJoint's error for the driver's.
    """

    def __init__(self, connection: Any, translated: Translated = _untranslated) -> None:
        self.connection = connection
        self._translated = translated

    @property
    def in_transaction(self) -> bool:
        """Whether the server has a transaction open, as it said itself."""
        return bool(self.connection.server_status & IN_TRANSACTION_IN_MYSQL)

    def execute(self, sql: str, args: Any = None) -> Any:
        """Execute SQL with its ``%s`` filled in and return the cursor."""
        cursor = self.connection.cursor()
        try:
            with Waiting(self.connection):
                cursor.execute(sql, args)
        except Exception as error:
            raise self._translated(error, sql) from error
        return cursor

    def query(self, query: str, args: Any = ()) -> Any:
        """Execute what may be executed again for other keys."""
        return self.execute(self._repeated(query, args), args)

    def commit_if_hit(self, query: str, args: Any = ()) -> bool:
        """Execute the last statement of a transaction and, unless no row was hit, begin the next one."""
        hit = bool(self.query(query, args).rowcount)
        if hit:
            self.execute(COMMIT_AND_CHAIN)
        return hit

    def close(self) -> None:
        """Leave nothing behind on the connection."""

    def _repeated(self, query: str, args: Any) -> str:
        return query


class PostgreSQLSession(Session):
    """Ends a transaction in one trip to the server, where an error keeps it from going on to the COMMIT."""

    @property
    def in_transaction(self) -> bool:
        return bool(self.connection.info.transaction_status != IDLE_IN_POSTGRESQL)

    def commit_if_hit(self, query: str, args: Any = ()) -> bool:
        demand = f"WITH hit AS ({query} RETURNING 1) SELECT 1 / count(*) FROM hit"
        try:
            self.execute(f"{self._repeated(demand, args)}; {COMMIT_AND_CHAIN}", args)
        except Exception as error:
            if getattr(error.__cause__, "pgcode", None) != DIVISION_BY_ZERO:
                raise
            return False
        return True


class PreparingSession(Session, ABC):
    """Has the server parse once what is executed for many keys."""

    execution: str
    """How a statement is executed by its name, with the places of its arguments."""

    def __init__(self, connection: Any, translated: Translated = _untranslated) -> None:
        super().__init__(connection, translated)
        self._names: dict[str, str] = {}

    def close(self) -> None:
        with suppress(Exception):  # a connection that is gone took them along
            for name in filter(None, self._names.values()):
                self.execute(f"DEALLOCATE PREPARE {name}")

    def _repeated(self, query: str, args: Any) -> str:
        if query not in self._names:
            self._names[query] = self._prepare(query, len(args), f"djdist_{uuid4().hex}")
        name, places = self._names[query], ", ".join(["%s"] * len(args))
        return self.execution.format(name, places) if name else query

    @abstractmethod
    def _prepare(self, query: str, count: int, name: str) -> str:
        """Prepare a query with ``count`` arguments; return its name, an empty one if the server refuses."""


class PlannedSession(PreparingSession, PostgreSQLSession):
    """Lets PostgreSQL parse and plan once what is executed for many keys."""

    execution = "EXECUTE {} ({})"

    def _prepare(self, query: str, count: int, name: str) -> str:
        places = tuple(f"${number}" for number in range(1, count + 1))
        self.execute(f"PREPARE {name} AS {query % places}")
        return name


class MariaDBSession(PreparingSession):
    """Ends a transaction in one trip to the server, by a block of statements, which MySQL does not have."""

    execution = "EXECUTE {} USING {}"

    def commit_if_hit(self, query: str, args: Any = ()) -> bool:
        block = COMMIT_OR_SIGNAL.format(query)
        execution = self._repeated(block, args)
        if execution == block:
            return super().commit_if_hit(query, args)
        try:
            self.execute(execution, args)
        except Exception as error:
            if NO_HIT not in _of_driver(error):
                raise
            return False
        return True

    def _prepare(self, query: str, count: int, name: str) -> str:
        try:
            self.execute(f"PREPARE {name} FROM %s", [query % (("?",) * count)])
        except Exception as error:
            if NOT_PREPARED.isdisjoint(_of_driver(error)):
                raise
            return ""
        return name


def _of_driver(error: Exception) -> tuple[Any, ...]:
    """Return the number and the message of the driver's error behind DataJoint's."""
    return getattr(error.__cause__, "args", ())


def is_mariadb(connection: Any) -> bool:
    """Return whether the server is MariaDB's, not MySQL's, which the same driver connects to."""
    return "MariaDB" in connection.get_server_info()


class LastStatement:
    """A session for the last statement of a transaction, which commits it if it hits a row.

    Attributes
    ----------
    executed : bool
        It was given a statement.
    rowcount : int
        1 if that hit a row, and the transaction is committed.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.executed = False
        self.rowcount = 0

    def query(self, query: str, args: Any = ()) -> "LastStatement":
        """Execute it."""
        self.executed = True
        self.rowcount = int(self._session.commit_if_hit(query, args))
        return self
