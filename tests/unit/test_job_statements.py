from __future__ import annotations

import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from djdist.database.job_statements import JobStatements, Statement, key_name
from djdist.errors import LeaseLostError

STATEMENTS = JobStatements(
    token=7,
    key=Statement("(id=%s)", ("key_id",)),
    key_columns="(id)",
    begin=Statement("UPDATE jobs SET host=%s WHERE token=%s", ("worker_host", "token")),
    held=Statement("SELECT 1 FROM jobs WHERE token=%s", ("token",)),
    made=Statement("SELECT 1 FROM jobs JOIN results WHERE token=%s", ("token",)),
    hand_back=Statement("UPDATE jobs SET host='' WHERE token=%s", ("token",)),
    finish=Statement("DELETE FROM jobs WHERE token=%s", ("token",)),
)
VALUES = {"worker_host": "a worker", "worker_pid": 1, "key_id": 3}


class Connection:
    """Says how many rows its statements hit."""

    def __init__(self, *hits: int) -> None:
        self.hits = list(hits)
        self.executed: list[tuple[str, list[Any]]] = []

    def query(self, query: str, args: Sequence[Any] = ()) -> SimpleNamespace:
        self.executed.append((query, list(args)))
        return SimpleNamespace(rowcount=self.hits.pop(0))


def test_beginning_fills_in_the_values_and_the_runs_token() -> None:
    connection = Connection(1)
    assert STATEMENTS.begins(connection, [VALUES]) == [True]
    assert connection.executed == [(f"{STATEMENTS.begin.sql} AND ((id=%s))", ["a worker", 7, 3])]


def test_a_job_that_is_not_hit_does_not_begin() -> None:
    assert STATEMENTS.begins(Connection(0), [VALUES]) == [False]


def test_many_jobs_begin_by_one_statement() -> None:
    connection = Connection(2)
    assert STATEMENTS.begins(connection, [VALUES, {**VALUES, "key_id": 4}]) == [True, True]
    assert connection.executed == [
        (f"{STATEMENTS.begin.sql} AND ((id) IN ((%s), (%s)))", ["a worker", 7, 3, 4])
    ]


@pytest.mark.parametrize("keys", [(0.1, 0.2), ("Jo", "Zoé")])
def test_what_a_list_would_change_is_searched_one_by_one(keys: Sequence[Any]) -> None:
    connection = Connection(2)
    STATEMENTS.begins(connection, [{**VALUES, "key_id": key} for key in keys])
    assert connection.executed[0][0] == f"{STATEMENTS.begin.sql} AND ((id=%s) OR (id=%s))"


def test_where_only_some_begin_it_is_asked_which() -> None:
    connection = Connection(1, 0, 1)
    assert STATEMENTS.begins(connection, [VALUES, {**VALUES, "key_id": 4}]) == [False, True]
    assert connection.executed[1:] == [(f"{STATEMENTS.held.sql} AND ((id=%s))", [7, key]) for key in (3, 4)]


@pytest.mark.parametrize("hits", [0, 1, 2])
def test_one_statement_asks_whether_any_of_many_is_made(hits: int) -> None:
    connection = Connection(hits)
    assert STATEMENTS.any_made(connection, [VALUES, {**VALUES, "key_id": 4}]) is bool(hits)
    assert connection.executed == [(f"{STATEMENTS.made.sql} AND ((id) IN ((%s), (%s)))", [7, 3, 4])]


def test_finishing_fills_in_the_values_in_the_statements_order() -> None:
    connection = Connection(1)
    STATEMENTS.finish_or_undo(connection, VALUES)
    assert connection.executed == [(f"{STATEMENTS.finish.sql} AND (id=%s)", [7, 3])]


def test_a_job_that_is_not_hit_is_undone() -> None:
    with pytest.raises(LeaseLostError, match="taken over"):
        STATEMENTS.finish_or_undo(Connection(0), VALUES)


def test_one_statement_finishes_many_jobs() -> None:
    connection = Connection(2)
    STATEMENTS.finish_all_or_undo(connection, [VALUES, {**VALUES, "key_id": 4}])
    assert connection.executed == [(f"{STATEMENTS.finish.sql} AND ((id) IN ((%s), (%s)))", [7, 3, 4])]


def test_where_one_of_many_is_not_hit_all_are_undone() -> None:
    with pytest.raises(LeaseLostError, match="taken over"):
        STATEMENTS.finish_all_or_undo(Connection(1), [VALUES, {**VALUES, "key_id": 4}])


def test_a_beginning_is_undone_with_the_runs_token() -> None:
    connection = Connection(0)
    STATEMENTS.hand_back_begun(connection, [VALUES])
    assert connection.executed == [(f"{STATEMENTS.hand_back.sql} AND ((id=%s))", [7, 3])]


def test_the_token_is_the_fences_whatever_the_values_say() -> None:
    connection = Connection(1)
    STATEMENTS.finish_or_undo(connection, {**VALUES, "token": 99})
    assert connection.executed[0][1][0] == 7


def test_keys_named_like_other_parameters_keep_apart() -> None:
    assert key_name("token") != "token"
    assert key_name("seconds") != "seconds"


def test_it_travels() -> None:
    assert pickle.loads(pickle.dumps(STATEMENTS)) == STATEMENTS
