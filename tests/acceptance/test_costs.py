"""What a key costs the database, as counts, which no noise moves."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from servers import Server

FEW, MANY = 200, 1200
OF_MAKE = 4
"""BEGIN, SELECT, INSERT, COMMIT."""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_key_costs_about_one_statement_beyond_those_of_its_make(
    lab: ModuleType, server: Server, connection: Any, processes: int
) -> None:
    if server.backend != "mysql":
        pytest.skip("PostgreSQL does not count statements")
    pipelines.fill(lab, subjects=1, sessions=FEW + MANY)

    def statements(max_calls: int) -> int:
        before = asked(connection)
        summary = lab.Square.populate(reserve_jobs=True, executor=executor, max_calls=max_calls)
        assert summary["success_count"] == max_calls
        return asked(connection) - before

    with djdist.LocalExecutor(processes) as executor:
        few, many = statements(FEW), statements(MANY)
    assert OF_MAKE < (many - few) / (MANY - FEW) <= OF_MAKE + 1.1


def asked(connection: Any) -> int:
    """Count the statements that the server has been asked by all its clients."""
    (_, count) = connection.query("SHOW GLOBAL STATUS LIKE 'Questions'").fetchone()
    return int(count)
