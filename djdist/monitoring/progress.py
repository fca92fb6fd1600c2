"""``djdist.progress()``: how far all tables of a pipeline are."""

from typing import Any

import pandas as pd

from djdist.errors import OptionError
from djdist.jobs.history import NO_JOBS, count_new, counts_of, names_of, rate, runs_seen
from djdist.jobs.table import all_jobs_to_look_at


def progress(*modules_or_tables: Any) -> pd.DataFrame:
    """Return the progress of auto-populated tables.

    Nothing is written to the database, and the jobs tables are not refreshed.

    Parameters
    ----------
    *modules_or_tables
        Modules or schemas, for all of their Computed and Imported tables, or such tables.

    Returns
    -------
    pandas.DataFrame
        A row for each table (index): the keys that are ``new`` since the last refresh, so that
        they have no job yet; the jobs that are ``pending``, ``reserved``, ``error`` and
        ``ignore``; how many keys are ``done`` of the ``total`` of the key source; how many
        ``runs`` are alive; ``keys_per_second`` they made in the last ten minutes, and
        ``seconds_left`` at that rate. The last two are NaN unless
        ``dj.config.jobs.keep_completed`` is on where ``populate()`` was called.

    Raises
    ------
    OptionError
        It is no such table, or a module has none.
    """
    if not modules_or_tables:
        raise OptionError("progress() needs a module or a table: djdist.progress(my_pipeline)")
    all_jobs = all_jobs_to_look_at(modules_or_tables)
    index = pd.Index(names_of(all_jobs), name="table")
    return with_time_left(pd.DataFrame([_row(jobs) for jobs in all_jobs], index=index, columns=COLUMNS))


COLUMNS = ["new", "pending", "reserved", "error", "ignore", "done", "total", "runs", "keys_per_second"]


def with_time_left(frame: pd.DataFrame) -> pd.DataFrame:
    """Add how long what waits and runs will take at the present rate."""
    left: pd.DataFrame = frame.assign(
        seconds_left=(frame["pending"] + frame["reserved"]) / frame["keys_per_second"]
    )
    return left


def _row(jobs: Any) -> dict[str, Any]:
    is_declared = jobs.is_declared
    counts = counts_of(jobs) if is_declared else NO_JOBS
    remaining, total = jobs.target.progress()
    row = dict.fromkeys(COLUMNS, 0) | counts | {"done": total - remaining, "total": total}
    row |= {"new": count_new(jobs) if is_declared else remaining, "keys_per_second": float("nan")}
    alive = sum(not run.is_dead for run in runs_seen(jobs)) if is_declared else 0
    return row | ({"runs": alive, "keys_per_second": rate(jobs)} if alive else {})
