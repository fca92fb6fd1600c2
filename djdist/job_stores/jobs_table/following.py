"""SQL of what comes of jobs upstream: in place of its marker a condition on them."""

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from djdist._job import Job
from djdist.database.job_statements import are_searched_as_list
from djdist.job_stores.jobs_table.changes import batches
from djdist.job_stores.jobs_table.functions import verbatim
from djdist.pipeline.jobs_table_spec import PARENTS, Following

QUOTES = {"mysql": "`", "postgresql": '"'}
VALUES_AT_ONCE = 600
"""MariaDB makes a list of 1000 values or more (``in_predicate_conversion_threshold``) a table, which it joins
with all rows instead of finding these by their key."""


def parents_in(jobs: Sequence[Job], following: Following) -> Iterator[Sequence[Job]]:
    """Part those of some jobs that are of the table upstream into as many as one statement looks for."""
    parents = [job for job in jobs if job.table == following.parent]
    return batches(parents, VALUES_AT_ONCE // len(following.columns))


def coming_of(parents: Sequence[Job], following: Following) -> sa.TextClause:
    """Return the SQL of what comes of some jobs of the table upstream, whose values travel beside it."""
    rows = [*dict.fromkeys(_values(job, following) for job in parents)]
    if not are_searched_as_list(rows):
        return _each_for_itself(rows, following)
    plain = [row[0] for row in rows] if len(following.columns) == 1 else rows
    listed: sa.BindParameter[Any] = sa.bindparam("parents", plain, expanding=True)
    return _with_condition(following, f"{_row(following.columns)} IN :parents").bindparams(listed)


def coming_of_failed(following: Following, backend: str) -> sa.TextClause:
    """Return the SQL of what comes of all jobs of the table upstream that have failed."""
    names = ", ".join(f"{QUOTES[backend]}{name}{QUOTES[backend]}" for name in following.names)
    failed = f"SELECT {names} FROM {following.jobs_table} WHERE status = 'error'"
    return _with_condition(following, f"{_row(following.columns)} IN ({failed})")


def any_failed(following: Following) -> sa.TextClause:
    """Return the SQL that counts jobs of the table upstream that have failed, up to one."""
    failed = f"SELECT 1 FROM {following.jobs_table} WHERE status = 'error' LIMIT 1"
    return verbatim(f"SELECT count(*) FROM ({failed}) AS failed")


def _each_for_itself(rows: Sequence[tuple[Any, ...]], following: Following) -> sa.TextClause:
    """Compare each row of values, as an equality finds some that a list doesn't."""
    conditions, values = list[str](), dict[str, Any]()
    for number, row in enumerate(rows):
        names = [f"parent_{number}_{position}" for position in range(len(row))]
        pairs = zip(following.columns, names, strict=True)
        conditions.append(" AND ".join(f"{column} = :{name}" for column, name in pairs))
        values |= dict(zip(names, row, strict=True))
    return _with_condition(following, " OR ".join(conditions)).bindparams(**values)


def _with_condition(following: Following, condition: str) -> sa.TextClause:
    return sa.text(verbatim(following.sql).text.replace(PARENTS, condition))


def _row(columns: Sequence[str]) -> str:
    return f"({', '.join(columns)})" if len(columns) > 1 else columns[0]


def _values(job: Job, following: Following) -> tuple[Any, ...]:
    key = job.key
    return tuple(key[name].bytes if name in following.uuids else key[name] for name in following.names)
