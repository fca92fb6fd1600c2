"""What keys need whose table says it of each one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from djdist._job import Ending, Job, Outcome, Report
from djdist._needs import Needs, checked
from djdist.database.errors import is_infrastructure
from djdist.worker.failure import failure_of, portable


def needs_of(table: Any, jobs: Sequence[Job]) -> Report:
    """Ask a table what keys need; what it raises over one of them is the key's error."""
    outcomes, needs = list[Outcome](), list[tuple[Job, Needs]]()
    for job in (replace(job, asks=False) for job in jobs):
        try:
            needs.append((job, checked(table.needs(dict(job.key)), type(table).__name__)))
        except Exception as error:
            ending = Ending.TRANSIENT if is_infrastructure(error) else Ending.FAILED
            outcomes.append(Outcome(job, ending, portable(failure_of(error))))
    return Report(tuple(outcomes), needs=tuple(needs))
