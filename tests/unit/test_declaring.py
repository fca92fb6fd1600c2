from __future__ import annotations

from typing import Any

import pymysql
import pytest

from djdist.jobs.table import declare

BUSY = pymysql.err.OperationalError(1684, "Table was skipped, its definition is being modified")
DENIED = pymysql.err.OperationalError(1142, "CREATE command denied")


class JobsTable:
    """A jobs table that is there or not by these answers; to declare it fails while some are left."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.declarations = 0

    @property
    def is_declared(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def declare(self) -> None:
        self.declarations += 1
        if self.answers:
            raise ValueError


@pytest.mark.parametrize(
    ("answers", "declarations"),
    [([True], 0), ([False], 1), ([BUSY], 1), ([BUSY, True], 1), ([False, True], 1)],
)
def test_what_another_process_is_just_declaring_is_declared(answers: list[Any], declarations: int) -> None:
    jobs: Any = JobsTable(*answers)
    declare(jobs)
    assert jobs.declarations == declarations


@pytest.mark.parametrize(("answers", "error"), [([DENIED], type(DENIED)), ([BUSY, False], ValueError)])
def test_what_can_not_be_declared_is_an_error(answers: list[Any], error: type[Exception]) -> None:
    jobs: Any = JobsTable(*answers)
    with pytest.raises(error):
        declare(jobs)
