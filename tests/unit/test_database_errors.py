from __future__ import annotations

import datajoint as dj
import pymysql
import pytest

from djdist.database.errors import is_away, is_denial, is_full, is_infrastructure, is_lost, limit_of

pytest.importorskip("psycopg2")
import psycopg2

FULL = [
    pymysql.err.OperationalError(1040, "Too many connections"),
    pymysql.err.OperationalError(1203, "User lab already has more than 'max_user_connections' connections"),
    pymysql.err.OperationalError(1226, "User 'lab' has exceeded the 'max_user_connections' resource"),
    psycopg2.OperationalError("FATAL:  sorry, too many clients already"),
    psycopg2.OperationalError('FATAL:  too many connections for role "lab"'),
    psycopg2.OperationalError("FATAL:  remaining connection slots are reserved for roles with the SUPERUSER"),
]
AWAY = [
    pymysql.err.OperationalError(2013, "Lost connection to MySQL server during query"),
    psycopg2.OperationalError("server closed the connection unexpectedly"),
    dj.errors.LostConnectionError("Connection was lost during a transaction."),
]
MYSQL_CODES = {
    1053: "Server shutdown in progress",
    1205: "Lock wait timeout exceeded; try restarting transaction",
    1213: "Deadlock found when trying to get lock; try restarting transaction",
    1243: "Unknown prepared statement handler (djdist_x) given to EXECUTE",
    1684: "Table was skipped since its definition is being modified by concurrent DDL statement",
    1290: "The MariaDB server is running with the --read-only option",
    1836: "Running in read-only mode",
    1927: "Connection was killed",
    4031: "The client was disconnected by the server because of inactivity",
}
POSTGRESQL_CODES = {
    "40001": "could not serialize access due to concurrent update",
    "40P01": "deadlock detected",
    "55P03": "could not obtain lock on row",
    "57P01": "terminating connection due to administrator command",
    "57P03": "the database system is starting up",
    "25006": "cannot execute INSERT in a read-only transaction",
}


def of_postgresql(code: str, message: str) -> psycopg2.Error:
    error = psycopg2.Error(message)
    error.__setstate__({"pgcode": code})  # type: ignore[no-untyped-call]
    return error


GIVEN_UP = [pymysql.err.OperationalError(*error) for error in MYSQL_CODES.items()] + [
    of_postgresql(*error) for error in POSTGRESQL_CODES.items()
]


class LostByTheLab(dj.errors.LostConnectionError):
    """An error that a pipeline may derive from DataJoint's."""


class Denied(dj.errors.AccessError):
    """Likewise."""


OF_THE_PIPELINE = [
    of_postgresql("23505", "duplicate key value violates unique constraint"),
    of_postgresql("42601", "syntax error"),
    pymysql.err.OperationalError(1290, "The MySQL server is running with the --secure-file-priv option"),
    pymysql.err.IntegrityError(1062, "Duplicate entry"),
    pymysql.err.OperationalError(1045, "Access denied"),
    dj.errors.LostConnectionError(),
    ValueError(),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_server_is_infrastructure(error: Exception) -> None:
    assert is_full(error)
    assert is_infrastructure(error)


@pytest.mark.parametrize("error", AWAY + GIVEN_UP, ids=str)
def test_a_server_that_is_away_is_not_full(error: Exception) -> None:
    assert not is_full(error)
    assert is_lost(error) is (error in AWAY)
    assert is_infrastructure(error)


def test_errors_derived_from_datajoints_are_taken_for_those() -> None:
    assert is_infrastructure(LostByTheLab("the server went away"))
    assert is_denial(Denied("no rights"))
    assert not is_denial(LostByTheLab("the server went away"))


@pytest.mark.parametrize("error", OF_THE_PIPELINE, ids=repr)
def test_errors_of_the_pipeline_are_neither(error: Exception) -> None:
    assert not is_full(error)
    assert not is_infrastructure(error)


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (of_postgresql("57014", "canceling statement due to statement timeout"), "statement_timeout"),
        (of_postgresql("57014", "canceling statement due to user request"), ""),
        (of_postgresql("55P03", "canceling statement due to lock timeout"), "lock_timeout"),
        (of_postgresql("55P03", "could not obtain lock on row"), ""),
        (pymysql.err.OperationalError(1969, "Query execution was interrupted"), "max_statement_time"),
        (pymysql.err.OperationalError(3024, "Query execution was interrupted"), "max_execution_time"),
        (ValueError(3024), ""),
        *[(error, "") for error in FULL + AWAY],
    ],
    ids=repr,
)
def test_a_limit_of_the_server_is_named(error: Exception, limit: str) -> None:
    assert limit_of(error) == limit


def test_the_limit_that_ended_a_session_is_named_by_what_was_met_afterwards() -> None:
    lost, own = dj.errors.LostConnectionError("Connection timed out"), ValueError("after a caught one")
    for error in (lost, own):
        error.__context__ = pymysql.err.OperationalError(4031, "disconnected because of inactivity")
    assert limit_of(lost) == "wait_timeout"
    assert limit_of(own) == ""


@pytest.mark.parametrize(
    ("error", "away"),
    [
        *((error, True) for error in AWAY),
        (pymysql.err.OperationalError(2003, "Can't connect to MySQL server on 'db'"), True),
        (pymysql.err.OperationalError(1205, MYSQL_CODES[1205]), False),
        (of_postgresql("57P03", POSTGRESQL_CODES["57P03"]), True),
        (of_postgresql("40P01", POSTGRESQL_CODES["40P01"]), False),
        (ValueError("no"), False),
    ],
)
def test_a_database_that_is_away_is_told_from_one_that_refuses(error: Exception, away: bool) -> None:
    assert is_away(error) == away
