"""What the database keeps of jobs: how many there are, and when and where those that ended ran."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any
from uuid import UUID

import datajoint as dj
import pandas as pd

from djdist._needs import MEMORY_USED
from djdist._style import VARYING_NUMBER
from djdist.database.sessions import server_now
from djdist.job_stores.jobs_table.lease import is_of_run, is_over
from djdist.jobs.critical_path import Relation, critical_path, relations_of
from djdist.pipeline.keys import new_keys

LAST_ERRORS = 1000
MOST_NOTES = 5
RATE_SECONDS = 600
IN_FULL = {"completed_time": "ended", "error_stack": "traceback"}
ENDED = ("status", "completed_time", "duration", "host", "pid", "error_message")
NO_JOBS = dict.fromkeys(("pending", "reserved", "success", "error", "ignore"), 0)
KEEP = "To keep it from now on, set dj.config.jobs.keep_completed = True where you call populate()."


@dataclass(frozen=True)
class RunSeen:
    """A run as its reservations show it.

    ``is_dead`` says that its lease is over, ``is_native`` that it is a worker of plain DataJoint, which
    has none and renews nothing.
    """

    user: str
    jobs: int
    begun: int
    hosts: int
    since_renewal: timedelta
    is_native: bool
    is_dead: bool


@dataclass(frozen=True)
class Snapshot:
    """A table's jobs at one moment.

    ``causes`` are those of its last errors, ``notes`` what is kept of jobs that are still to be made, and of
    how many: those that have run out of memory.
    """

    counts: dict[str, int]
    causes: pd.DataFrame
    runs: tuple[RunSeen, ...]
    notes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class History:
    """The jobs of some tables.

    Attributes
    ----------
    counts : pandas.DataFrame
        How many keys are ``made`` and how many jobs there are by status, by table (index).
    jobs : pandas.DataFrame
        Those that ended: table, key, status, began, ended, seconds, host, pid, error_message.
        An error has no seconds; a pid of 0 is an unknown process; ``values`` holds the key as a dict.
    notes : tuple of str
        What was not kept, and how to keep it.
    relations : tuple of Relation
        Which tables need which.
    """

    counts: pd.DataFrame
    jobs: pd.DataFrame
    notes: tuple[str, ...]
    relations: tuple[Relation, ...] = ()

    @property
    def made(self) -> pd.DataFrame:
        """The jobs that were made."""
        made: pd.DataFrame = self.jobs[self.jobs["status"] == "success"]
        return made

    @cached_property
    def critical_path(self) -> pd.DataFrame:
        """The jobs of the chain that took longest, of which each needed the one before."""
        path: pd.DataFrame = self.jobs.loc[[*critical_path(self.jobs, self.relations)]]
        return path

    @property
    def memory(self) -> pd.DataFrame:
        """What processes had and keys asked for, in GiB, by table: of made jobs that say so."""
        made = self.made
        said = made["error_message"].astype("str").str.extract(MEMORY_USED).astype(float)
        said.columns = pd.Index(["had", "asked for"])
        by_table = said.dropna().groupby(made["table"], sort=False)
        memory: pd.DataFrame = by_table.agg(
            keys=("had", "size"),
            median=("had", "median"),
            most=("had", "max"),
            asked_for=("asked for", "max"),
        )
        return memory

    @property
    def causes(self) -> pd.DataFrame:
        """The errors of each table by their cause."""
        errors = self.jobs[self.jobs["status"] == "error"]
        if len(self.counts) == 1 or not len(errors):
            return by_cause(errors)
        parts = [_named(by_cause(rows), str(table)) for table, rows in errors.groupby("table")]
        causes: pd.DataFrame = pd.concat(parts).sort_values("errors", ascending=False, ignore_index=True)
        return causes


def snapshot(jobs: dj.Job) -> Snapshot:
    """Return what is known of a table's jobs, by four queries that stay quick with many jobs."""
    errors = jobs.errors.proj("error_message", ended="completed_time")
    last = _fetch(errors, order_by="ended DESC", limit=LAST_ERRORS)
    return Snapshot(counts_of(jobs), by_cause(last), tuple(runs_seen(jobs)), tuple(_notes(jobs)))


def _notes(jobs: dj.Job) -> Iterator[tuple[str, int]]:
    noted = jobs & "status in ('pending', 'reserved') and error_message <> ''"
    counted = dj.U("error_message").aggr(noted, jobs="count(*)")
    for row in counted.to_dicts(order_by="jobs DESC", limit=MOST_NOTES):
        yield row["error_message"], int(row["jobs"])


def history(all_jobs: Sequence[dj.Job]) -> History:
    """Read the jobs of some tables, each table's in one query."""
    names = names_of(all_jobs)
    read = [_read(jobs, name) for jobs, name in zip(all_jobs, names, strict=True)]
    return History(
        counts=pd.DataFrame([counts for counts, _, _ in read], index=names),
        jobs=pd.concat([ended for _, ended, _ in read], ignore_index=True),
        notes=tuple(note for _, _, notes in read for note in notes),
        relations=tuple(relations_of(dict(zip(names, all_jobs, strict=True)))) if len(names) > 1 else (),
    )


def by_cause(errors: pd.DataFrame) -> pd.DataFrame:
    """Group errors by the first line of their message, whatever the numbers in it.

    Returns
    -------
    pandas.DataFrame
        ``cause``, ``errors`` (how many), ``first`` and ``last`` (when); the most frequent first.
    """
    groups = errors.groupby(cause_of_each(errors), sort=False)
    causes = groups.agg(errors=("error_message", "size"), first=("ended", "min"), last=("ended", "max"))
    named: pd.DataFrame = causes.sort_values("errors", ascending=False).reset_index()
    return named


def cause_of_each(errors: pd.DataFrame) -> pd.Series:
    """Return the cause of each error: the first line of its message, without the numbers that vary."""
    lines = errors["error_message"].astype("str").str.strip().str.split("\n").str[0]
    patterns = lines.str.replace(VARYING_NUMBER, "…", regex=True)
    varies = lines.groupby(patterns).transform("nunique") > 1
    causes: pd.Series = lines.mask(varies, patterns).rename("cause")
    return causes


def rate(jobs: dj.Job) -> float:
    """Return how many keys per second were made lately; NaN where made jobs are not kept."""
    now = server_now(jobs.connection)
    recent = jobs.completed & f"completed_time > '{now - timedelta(seconds=RATE_SECONDS)}'"
    seen = dj.U().aggr(recent, made="count(*)", first="min(completed_time)").fetch1()
    seconds = (now - seen["first"]).total_seconds() if seen["made"] else 0
    return seen["made"] / seconds if seconds > 0 else float("nan")


def last_errors(jobs: dj.Job) -> pd.DataFrame:
    """Read the last errors in full.

    Returns
    -------
    pandas.DataFrame
        ``cause``, ``key`` (as a dict), ``error_message``, ``ended``, ``host``, ``pid`` and
        ``traceback``; the last first.
    """
    of_errors = {"order_by": "completed_time DESC", "limit": LAST_ERRORS}
    rows = jobs.errors.to_dicts(**of_errors) if jobs.is_declared else []
    errors = pd.DataFrame(rows, columns=[*ENDED, "error_stack"]).rename(columns=IN_FULL)
    keys = [{name: row[name] for name in jobs.primary_key} for row in rows]
    named = errors.assign(key=pd.Series(keys, dtype=object), cause=cause_of_each(errors))
    in_full: pd.DataFrame = named[["cause", "key", "error_message", "ended", "host", "pid", "traceback"]]
    return in_full


def names_of(all_jobs: Sequence[dj.Job]) -> list[str]:
    """Return the names of some jobs' tables, with schemas where the names alone are ambiguous."""
    short = [type(jobs.target).__name__ for jobs in all_jobs]
    long = [f"{jobs.database}.{name}" for jobs, name in zip(all_jobs, short, strict=True)]
    return long if len(set(short)) < len(short) else short


def counts_of(jobs: dj.Job) -> dict[str, int]:
    """Return the number of jobs by status."""
    counted = dj.U("status").aggr(jobs, number="count(*)").to_dicts()
    return NO_JOBS | {row["status"]: int(row["number"]) for row in counted}


def count_new(jobs: dj.Job) -> int:
    """Return the number of keys to be made that have no job yet, or one whose result is gone."""
    waiting = dj.FreeTable(jobs.connection, jobs.full_table_name) & "status <> 'success'"
    return len(new_keys(jobs.target._jobs_to_do(()), jobs, known=waiting))


def runs_seen(jobs: dj.Job) -> Iterator[RunSeen]:
    """Return who holds reservations, those with the most of them first."""
    now = server_now(jobs.connection)
    reservations = dj.U("connection_id", "user").aggr(
        jobs.reserved,
        jobs="count(*)",
        begun="count(nullif(pid, 0))",
        hosts="count(distinct host)",
        renewed_at="max(reserved_time)",
    )
    for row in reservations.to_dicts(order_by="jobs DESC"):
        token, renewed_at = row.pop("connection_id"), row.pop("renewed_at")
        is_native = not is_of_run(token)
        is_dead = not is_native and is_over(
            token, renewed_at, lambda seconds: now + timedelta(seconds=seconds)
        )
        yield RunSeen(**row, since_renewal=now - renewed_at, is_native=is_native, is_dead=is_dead)


def _named(causes: pd.DataFrame, table: str) -> pd.DataFrame:
    named: pd.DataFrame = causes.assign(cause=f"{table}: " + causes["cause"])
    return named


def _read(jobs: dj.Job, name: str) -> tuple[dict[str, int], pd.DataFrame, list[str]]:
    """Return a table's counts, its jobs that ended, and what is not known of them."""
    is_declared = jobs.is_declared
    key = jobs.primary_key if is_declared else jobs.target.primary_key
    counts = counts_of(jobs) if is_declared else {**NO_JOBS}
    rows = _from_jobs_table(jobs) if is_declared else pd.DataFrame(columns=[*key, *ENDED])
    ended = _frame(name, key, rows)
    timed = counts.pop("success")
    if jobs.restriction:
        return {"made": timed} | counts, ended, []
    notes: list[str] = []
    if not timed and "_job_start_time" in _columns(jobs.target):
        made = _frame(name, key, _from_target(jobs.target, key))
        ended, timed = pd.concat([ended, made], ignore_index=True), len(made)
        if timed:
            notes.append(f"{name}: on which host and in which process a key was made is not known. {KEEP}")
    present = len(dj.U(*key) & jobs.target)
    if timed < present:
        notes.append(f"{name}: when {present - timed:,} of {present:,} keys were made is not known. {KEEP}")
    return {"made": present} | counts, ended, notes


def _from_jobs_table(jobs: dj.Job) -> pd.DataFrame:
    return _fetch((jobs & "status in ('success', 'error')").proj(*ENDED))


def _from_target(table: dj.Table, key: Sequence[str]) -> pd.DataFrame:
    """Read the hidden columns of ``dj.config.jobs.add_job_metadata``."""
    rows = _fetch(table.proj(began="COALESCE(_job_start_time)", duration="COALESCE(_job_duration)"))
    rows = rows.dropna(subset=["began", "duration"]).drop_duplicates(key)
    ended = pd.to_datetime(rows["began"]) + _timedelta(rows["duration"])
    made: pd.DataFrame = rows.assign(completed_time=ended, status="success", host="", pid=0, error_message="")
    return made


def _frame(name: str, key: Sequence[str], rows: pd.DataFrame) -> pd.DataFrame:
    ended = pd.to_datetime(rows["completed_time"])
    frame: pd.DataFrame = rows[["status", "host", "pid", "error_message"]].assign(
        table=name,
        key=_texts(rows, key),
        values=rows[[*key]].to_dict("records"),
        began=ended - _timedelta(rows["duration"]),
        ended=ended,
        seconds=rows["duration"].astype(float),
    )
    return frame


def _timedelta(seconds: pd.Series) -> pd.Series:
    return pd.to_timedelta(seconds.astype(float).fillna(0), unit="s")


def _texts(rows: pd.DataFrame, names: Sequence[str]) -> list[str]:
    columns = [rows[name].map(lambda v: UUID(bytes=v) if isinstance(v, bytes) else v) for name in names]
    return [", ".join(map("{}={}".format, names, values)) for values in zip(*columns, strict=True)]


def _columns(table: Any) -> list[str]:
    """Return the names of all columns of a table, also of the hidden ones."""
    return list(table.heading._attributes) if table.heading.names else []


def _fetch(query: dj.expression.QueryExpression, **which: Any) -> pd.DataFrame:
    """Read rows as the server gives them, which is ten times as fast as ``to_pandas()``."""
    chosen = query & dj.Top(**which) if which else query
    rows: pd.DataFrame = pd.DataFrame(chosen.cursor().fetchall(), columns=list(chosen.heading.names))
    return rows
