from __future__ import annotations

from typing import Any

import pytest

from djdist.worker.session import PlannedSession, Session


class Connection:
    """Keeps what its cursors execute; refuses what it is told to."""

    def __init__(self, refused: str = "nothing") -> None:
        self.executed: list[tuple[str, Any]] = []
        self.refused = refused

    def cursor(self) -> Connection:
        return self

    def execute(self, sql: str, args: Any = None) -> None:
        if sql.startswith(self.refused):
            raise ValueError(sql)
        self.executed.append((sql, args))


def translated(error: Exception, sql: str) -> Exception:
    return RuntimeError(f"{error} of {sql}")


def test_a_session_executes_what_it_is_given() -> None:
    connection = Connection()
    session = Session(connection)
    session.query("DELETE FROM jobs WHERE id=%s", [3])
    session.forget_plans()
    assert connection.executed == [("DELETE FROM jobs WHERE id=%s", [3])]


def test_an_error_is_datajoints() -> None:
    with pytest.raises(RuntimeError, match="DELETE of DELETE"):
        Session(Connection(refused="DELETE"), translated).query("DELETE")


def test_a_plan_is_made_once_and_removed_at_the_end() -> None:
    connection = Connection()
    session = PlannedSession(connection, translated)
    for key in (3, 4):
        session.query("DELETE FROM jobs WHERE token=%s AND id=%s", [7, key])
    session.forget_plans()
    (prepare, _), *executions, (deallocate, _) = connection.executed
    name = prepare.split()[1]
    assert prepare == f"PREPARE {name} AS DELETE FROM jobs WHERE token=$1 AND id=$2"
    assert executions == [(f"EXECUTE {name} (%s, %s)", [7, key]) for key in (3, 4)]
    assert deallocate == f"DEALLOCATE {name}"


def test_a_connection_that_is_gone_hinders_no_end() -> None:
    session = PlannedSession(Connection(refused="DEALLOCATE"), translated)
    session.query("DELETE FROM jobs WHERE id=%s", [3])
    session.forget_plans()


def test_sessions_of_one_connection_keep_apart() -> None:
    connection = Connection()
    for _ in range(2):
        PlannedSession(connection, translated).query("DELETE")
    assert connection.executed[0] != connection.executed[2]
