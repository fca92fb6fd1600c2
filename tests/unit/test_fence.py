from __future__ import annotations

import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from djdist.errors import LeaseLostError
from djdist.fence import Fence, Statement, key_name

FENCE = Fence(
    token=7,
    begin=Statement("UPDATE jobs SET host=%s WHERE id=%s AND token=%s", ("worker_host", "key_id", "token")),
    finish=Statement("DELETE FROM jobs WHERE token=%s AND id=%s", ("token", "key_id")),
    forgo=Statement("UPDATE jobs SET host='' WHERE id=%s AND token=%s", ("key_id", "token")),
)
VALUES = {"worker_host": "a worker", "worker_pid": 1, "key_id": 3}


class Connection:
    """Says how many rows a statement hits."""

    def __init__(self, hits: int) -> None:
        self.hits = hits
        self.executed: list[tuple[str, list[Any]]] = []

    def query(self, query: str, args: Sequence[Any] = ()) -> SimpleNamespace:
        self.executed.append((query, list(args)))
        return SimpleNamespace(rowcount=self.hits)


def test_beginning_fills_in_the_values_and_the_runs_token() -> None:
    connection = Connection(hits=1)
    assert FENCE.begins(connection, VALUES)
    assert connection.executed == [(FENCE.begin.sql, ["a worker", 3, 7])]


def test_a_job_that_is_not_hit_does_not_begin() -> None:
    assert not FENCE.begins(Connection(hits=0), VALUES)


def test_finishing_fills_in_the_values_in_the_statements_order() -> None:
    connection = Connection(hits=1)
    FENCE.finish_or_undo(connection, VALUES)
    assert connection.executed == [(FENCE.finish.sql, [7, 3])]


def test_a_job_that_is_not_hit_is_undone() -> None:
    with pytest.raises(LeaseLostError, match="taken over"):
        FENCE.finish_or_undo(Connection(hits=0), VALUES)


def test_a_beginning_is_undone_with_the_runs_token() -> None:
    connection = Connection(hits=0)
    FENCE.forgo_if_begun(connection, VALUES)
    assert connection.executed == [(FENCE.forgo.sql, [3, 7])]


def test_the_token_is_the_fences_whatever_the_values_say() -> None:
    connection = Connection(hits=1)
    FENCE.finish_or_undo(connection, {**VALUES, "token": 99})
    assert connection.executed[0][1][0] == 7


def test_keys_named_like_other_parameters_keep_apart() -> None:
    assert key_name("token") != "token"
    assert key_name("seconds") != "seconds"


def test_it_travels() -> None:
    assert pickle.loads(pickle.dumps(FENCE)) == FENCE
