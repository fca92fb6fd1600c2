"""What a worker executes beside DataJoint, on the same connection."""

from collections.abc import Callable
from contextlib import suppress
from itertools import count
from re import sub
from typing import Any
from uuid import uuid4

Translated = Callable[[Exception, str], Exception]
"""Gives DataJoint's error for the driver's."""


class Session:
    """Executes statements without what DataJoint does for each: it looks for warnings, and connects anew.

    Parameters
    ----------
    connection : pymysql.Connection or psycopg2.extensions.connection
        The connection of the database's driver.
    translated : callable, optional
        Gives DataJoint's error for the driver's.
    """

    def __init__(self, connection: Any, translated: Translated = lambda error, _: error) -> None:
        self.connection = connection
        self._translated = translated

    def execute(self, sql: str, args: Any = None) -> Any:
        """Execute SQL with its ``%s`` filled in and return the cursor."""
        cursor = self.connection.cursor()
        try:
            cursor.execute(sql, args)
        except Exception as error:
            raise self._translated(error, sql) from error
        return cursor

    def query(self, query: str, args: Any = ()) -> Any:
        """Execute what may be executed again for other keys."""
        return self.execute(query, args)

    def forget_plans(self) -> None:
        """Leave no plan behind on the connection."""


class PlannedSession(Session):
    """Lets PostgreSQL parse and plan once what is executed for many keys."""

    def __init__(self, connection: Any, translated: Translated) -> None:
        super().__init__(connection, translated)
        self._names: dict[str, str] = {}

    def query(self, query: str, args: Any = ()) -> Any:
        if query not in self._names:
            self._names[query] = self._prepare(query)
        places = ", ".join(["%s"] * len(args))
        return self.execute(f"EXECUTE {self._names[query]} ({places})", args)

    def forget_plans(self) -> None:
        with suppress(Exception):  # a connection that is gone took them along
            for name in self._names.values():
                self.execute(f"DEALLOCATE {name}")

    def _prepare(self, query: str) -> str:
        name, number = f"djdist_{uuid4().hex}", count(1)
        numbered = sub("%s", lambda _: f"${next(number)}", query).replace("%%", "%")
        self.execute(f"PREPARE {name} AS {numbered}")
        return name
