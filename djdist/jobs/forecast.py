"""What a run would do, found out without touching anything: ``populate(dry_run=True)``."""

from collections.abc import Iterator, Mapping
from typing import Any

import datajoint as dj
import pandas as pd

from djdist._needs import Needs
from djdist.jobs.history import NO_JOBS, counts_of
from djdist.jobs.table import jobs_to_look_at
from djdist.pipeline.expected import expected_keys, held_back
from djdist.pipeline.key_sources import is_default
from djdist.pipeline.keys import missing_keys
from djdist.pipeline.plan import Plan, PlannedTable

COLUMNS = [
    "done", "missing", "later", "pending", "reserved", "error", "ignore",
    "needs", "seconds_per_key", "seconds_left", "waits_for",
]  # fmt: skip


def forecast(plan: Plan, needs: Mapping[str, Needs | None]) -> pd.DataFrame:
    """Return what a run would do.

    Parameters
    ----------
    plan : Plan
        Its tables.
    needs : dict of str to Needs
        What a key of each needs.

    Returns
    -------
    pandas.DataFrame
        A row for each table (index), in their order: how many keys are ``done``, are ``missing`` and could be
        made now, and will be there ``later``, once those upstream are made; the jobs that are ``pending``,
        ``reserved``, ``error`` and ``ignore``; what one key ``needs``; ``seconds_per_key`` by past durations,
        and ``seconds_left`` if one key was made at a time; in words, what the table ``waits_for``.
    """
    all_jobs = {planned.name: jobs_to_look_at(planned.table) for planned in plan.tables}
    rows = [_row(plan, planned, all_jobs) | {"needs": _text(needs[planned.name])} for planned in plan.tables]
    index = pd.Index([planned.name for planned in plan.tables], name="table")
    frame: pd.DataFrame = pd.DataFrame(rows, index=index, columns=COLUMNS)
    return frame


def _row(plan: Plan, planned: PlannedTable, all_jobs: dict[str, Any]) -> dict[str, Any]:
    jobs, table = all_jobs[planned.name], planned.table
    missing, total = table.progress(*planned.restrictions)
    later = max(0, len(missing_keys(expected_keys(plan, planned), table)) - missing)
    counts = counts_of(jobs) if jobs.is_declared else NO_JOBS
    seconds = _seconds_per_key(jobs)
    row = {"done": total - missing, "missing": missing, "later": later}
    row |= {status: counts[status] for status in ("pending", "reserved", "error", "ignore")}
    return row | {
        "seconds_per_key": seconds,
        "seconds_left": seconds * (missing + later),
        "waits_for": "; ".join(_obstacles(plan, planned, all_jobs)),
    }


def _text(needs: Needs | None) -> str:
    return str(needs) if isinstance(needs, Needs) else "what each key says"


def _seconds_per_key(jobs: Any) -> float:
    """Return how long keys took that were made before; NaN where that was not kept."""
    if not jobs.is_declared:
        return float("nan")
    known = dj.U().aggr(jobs.completed, seconds="avg(duration)").fetch1("seconds")
    return float("nan") if known is None else float(known)


def _obstacles(plan: Plan, planned: PlannedTable, all_jobs: dict[str, Any]) -> Iterator[str]:
    """Say what keeps keys from being made, or from being known."""
    if not is_default(planned.table):
        yield "its own key_source, whose later keys nobody knows"
    for name in _empty_parents(plan, planned):
        yield f"{name} is empty"
    if planned.after:
        yield f"{', '.join(planned.after)} to be done"
    for table, attributes, query in held_back(plan, planned):
        jobs = all_jobs[table]
        errors = jobs.errors if jobs.is_declared else ()
        failed = errors and errors.proj(**{name: other for name, other in attributes if name != other})
        if failed and (keys := len(query.restrict(failed, semantic_check=False))):
            yield f"{len(errors)} errors of {table} hold back {keys} keys"


def _empty_parents(plan: Plan, planned: PlannedTable) -> Iterator[str]:
    """Yield the tables of its key that are empty and that the run itself doesn't fill."""
    members = {member.table.full_table_name for member in plan.tables}
    for parent in planned.table.parents(primary=True, as_objects=True):
        if plan.foreign_keys.whole(parent.full_table_name) not in members and not parent:
            yield dj.utils.to_camel_case(parent.table_name.strip("_#"))
