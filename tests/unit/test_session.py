from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from djdist.worker.make_session import WORTH_PREPARING, MakeSession
from djdist.worker.session import (
    LastStatement,
    MariaDBSession,
    PlannedSession,
    PostgreSQLSession,
    Session,
)


class Connection:
    """Keeps what its cursors execute, hits so many rows, and refuses what it is told to."""

    def __init__(self, refused: str = "nothing", rowcount: int = 1, number: int = 0) -> None:
        self.executed: list[tuple[str, Any]] = []
        self.refused = refused
        self.number = number
        self.rowcount = rowcount

    def cursor(self) -> Connection:
        return self

    def execute(self, sql: str, args: Any = None) -> None:
        if sql.startswith(self.refused):
            raise ValueError(self.number, sql)
        self.executed.append((sql, args))


def translated(error: Exception, sql: str) -> Exception:
    return RuntimeError(f"{error} of {sql}")


def test_a_session_executes_what_it_is_given() -> None:
    connection = Connection()
    session = Session(connection)
    session.query("DELETE FROM jobs WHERE id=%s", [3])
    session.close()
    assert connection.executed == [("DELETE FROM jobs WHERE id=%s", [3])]


@pytest.mark.parametrize("rowcount", [0, 1])
def test_a_session_commits_what_hit_a_row(rowcount: int) -> None:
    connection = Connection(rowcount=rowcount)
    last = LastStatement(Session(connection))
    assert last.query("DELETE FROM jobs WHERE id=%s", [3]).rowcount == rowcount
    assert last.rowcount == rowcount
    assert [sql for sql, _ in connection.executed[1:]] == ["COMMIT AND CHAIN"] * rowcount


def test_postgresql_is_sent_the_last_statement_with_the_commit() -> None:
    connection = Connection()
    assert PostgreSQLSession(connection, translated).commit_if_hit("DELETE FROM jobs WHERE id=%s", [3])
    ((sql, args),) = connection.executed
    assert "(DELETE FROM jobs WHERE id=%s RETURNING 1)" in sql
    assert sql.endswith("; COMMIT AND CHAIN")
    assert args == [3]


def test_an_error_that_is_no_lost_job_is_raised() -> None:
    with pytest.raises(RuntimeError, match="of WITH"):
        PostgreSQLSession(Connection(refused="WITH"), translated).commit_if_hit("DELETE FROM jobs")


def test_an_error_is_datajoints() -> None:
    with pytest.raises(RuntimeError, match=r"DELETE.* of DELETE"):
        Session(Connection(refused="DELETE"), translated).query("DELETE")


def test_a_plan_is_made_once_and_removed_at_the_end() -> None:
    connection = Connection()
    session = PlannedSession(connection, translated)
    for key in (3, 4):
        session.query("DELETE FROM jobs WHERE token=%s AND id=%s", [7, key])
    session.close()
    (prepare, _), *executions, (deallocate, _) = connection.executed
    name = prepare.split()[1]
    assert prepare == f"PREPARE {name} AS DELETE FROM jobs WHERE token=$1 AND id=$2"
    assert executions == [(f"EXECUTE {name} (%s, %s)", [7, key]) for key in (3, 4)]
    assert deallocate == f"DEALLOCATE PREPARE {name}"


def test_a_plan_serves_the_last_statement_too() -> None:
    connection = Connection()
    session = PlannedSession(connection, translated)
    for key in (3, 4):
        assert session.commit_if_hit("DELETE FROM jobs WHERE id=%s", [key])
    (prepare, _), *executions = connection.executed
    name = prepare.split()[1]
    assert executions == [(f"EXECUTE {name} (%s); COMMIT AND CHAIN", [key]) for key in (3, 4)]


def test_a_connection_that_is_gone_hinders_no_end() -> None:
    session = PlannedSession(Connection(refused="DEALLOCATE"), translated)
    session.query("DELETE FROM jobs WHERE id=%s", [3])
    session.close()


def test_sessions_of_one_connection_keep_apart() -> None:
    connection = Connection()
    for _ in range(2):
        PlannedSession(connection, translated).query("DELETE")
    assert connection.executed[0] != connection.executed[2]


def test_mariadb_parses_once_what_ends_a_transaction() -> None:
    connection = Connection()
    session = MariaDBSession(connection, translated)
    for key in (3, 4):
        assert session.commit_if_hit("DELETE FROM jobs WHERE token%%9=%s AND id=%s", [7, key])
    session.close()
    (prepare, (block,)), *executions, (deallocate, _) = connection.executed
    name = prepare.split()[1]
    assert block.startswith("BEGIN NOT ATOMIC DELETE FROM jobs WHERE token%9=? AND id=?; ")
    assert executions == [(f"EXECUTE {name} USING %s, %s", [7, key]) for key in (3, 4)]
    assert deallocate == f"DEALLOCATE PREPARE {name}"


def test_mariadb_ends_a_transaction_in_two_trips_where_it_prepares_no_more() -> None:
    connection = Connection(refused="PREPARE", number=1461)
    session = MariaDBSession(connection, translated)
    assert session.commit_if_hit("DELETE FROM jobs WHERE id=%s", [3])
    session.close()
    assert connection.executed == [("DELETE FROM jobs WHERE id=%s", [3]), ("COMMIT AND CHAIN", None)]


def test_mariadb_commits_nothing_of_a_transaction_that_is_gone_when_it_is_to_prepare_its_end() -> None:
    """A node of a cluster tells with the next statement that it has given up the transaction."""
    connection = Connection(refused="PREPARE", number=1213)
    with pytest.raises(RuntimeError, match="1213"):
        MariaDBSession(connection, translated).commit_if_hit("DELETE FROM jobs WHERE id=%s", [3])
    assert connection.executed == []


@pytest.mark.parametrize("number", [1213, 1644])
def test_an_error_of_mariadb_that_is_no_lost_job_is_raised(number: int) -> None:
    """A lab's trigger may signal, too, with the number that the block's own signal has."""
    with pytest.raises(RuntimeError, match="of EXECUTE"):
        MariaDBSession(Connection(refused="EXECUTE", number=number), translated).commit_if_hit("DELETE")


def test_what_looks_like_the_place_of_a_value_in_a_name_stays() -> None:
    connection = Connection()
    MariaDBSession(connection, translated).commit_if_hit("DELETE FROM `of 5%%s` WHERE id=%s", [3])
    ((_, (block,)), _) = connection.executed
    assert "FROM `of 5%s` WHERE id=?" in block


@pytest.mark.parametrize(
    ("backend", "version", "few", "many"),
    [
        ("mysql", "8.4.0", Session, Session),
        ("mysql", "10.11.6-MariaDB", Session, MariaDBSession),
        ("postgresql", "", PostgreSQLSession, PlannedSession),
    ],
)
def test_a_large_group_has_what_the_server_prepares(
    backend: str, version: str, few: type[Session], many: type[Session]
) -> None:
    connection = SimpleNamespace(
        _conn=SimpleNamespace(get_server_info=lambda: version),
        adapter=SimpleNamespace(backend=backend, translate_error=translated),
    )
    table = SimpleNamespace(
        connection=connection, make=lambda key: None, _has_job_metadata_attrs=lambda: False
    )
    for count, kind in {1: Session, WORTH_PREPARING - 1: few, WORTH_PREPARING: many}.items():
        assert type(MakeSession(table, {}, count=count).session) is kind
