"""A transaction in which the keys of a table are made one after the other."""

from typing import Any

from djdist.worker.session import Session

SAVEPOINT = "djdist_shared"


class SharedTransaction:
    """Knows whether the transaction that has just begun is still the same.

    A ``make()`` may end it, by a COMMIT or ROLLBACK of its own, by a statement before which MySQL commits, or
    by catching what tells of a lost connection, after which DataJoint has another one. The savepoint in it
    goes with it, also where another transaction has begun since.

    Parameters
    ----------
    connection : datajoint.Connection
        DataJoint's connection.
    session : Session
        Executes statements on it.

    Attributes
    ----------
    is_torn : bool
        It was seen to be another one, or none: what was made in it may be committed, or lost.
    """

    def __init__(self, connection: Any, session: Session) -> None:
        self._connection = connection
        self._session = session
        self.is_torn = False
        session.execute(f"SAVEPOINT {SAVEPOINT}")

    def goes_on(self) -> bool:
        """Return whether some transaction is open, which costs no trip to the server."""
        is_same_connection = self._connection._conn is self._session.connection
        self.is_torn = self.is_torn or not (is_same_connection and self._session.in_transaction)
        return not self.is_torn

    def look(self, action: str = "ROLLBACK TO") -> bool:
        """Ask the server whether it is still the same, by what is to be done with its savepoint."""
        if self.goes_on():
            try:
                self._session.execute(f"{action} SAVEPOINT {SAVEPOINT}")
            except Exception:
                self.is_torn = True
        return not self.is_torn
