from __future__ import annotations

import datajoint as dj
import psycopg2
import pymysql
import pytest

from djdist.pipeline import is_full, is_infrastructure

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
OF_THE_PIPELINE = [
    pymysql.err.OperationalError(1045, "Access denied"),
    dj.errors.LostConnectionError(),
    ValueError(),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_server_is_infrastructure(error: Exception) -> None:
    assert is_full(error)
    assert is_infrastructure(error)


@pytest.mark.parametrize("error", AWAY, ids=str)
def test_a_server_that_is_away_is_not_full(error: Exception) -> None:
    assert not is_full(error)
    assert is_infrastructure(error)


@pytest.mark.parametrize("error", OF_THE_PIPELINE, ids=repr)
def test_errors_of_the_pipeline_are_neither(error: Exception) -> None:
    assert not is_full(error)
    assert not is_infrastructure(error)
