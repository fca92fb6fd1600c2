"""The jobs table as a job store: the verbs of the contract."""

import logging
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import sqlalchemy as sa

from djdist._job import Failure, Job
from djdist._job_store import JobStore
from djdist.database.job_statements import JobStatements
from djdist.errors import DatabaseError
from djdist.job_stores.jobs_table.blob import pack_text
from djdist.job_stores.jobs_table.changes import FRESH, UNRESERVED, Changes, batches, discouraging
from djdist.job_stores.jobs_table.conditions import Conditions, Where
from djdist.job_stores.jobs_table.dead_workers import DeadWorkers
from djdist.job_stores.jobs_table.following import any_failed, coming_of_failed
from djdist.job_stores.jobs_table.functions import NOW, in_seconds, verbatim, without_index
from djdist.job_stores.jobs_table.lease import SMALLEST_TOKEN, lease_seconds_of
from djdist.job_stores.jobs_table.refreshing import Refreshing, add_new, refresh
from djdist.job_stores.jobs_table.statements import job_statements
from djdist.job_stores.jobs_table.transactions import Transactions, TransactionsOn
from djdist.pipeline.jobs_table_spec import JobsTableSpec

logger = logging.getLogger(__name__)

ERROR_MESSAGE_LENGTH = 2047
TRUNCATED = "...truncated"


@dataclass(frozen=True)
class Owner:
    """Whose reservations they are; recorded in the jobs table."""

    token: int
    user: str = ""
    version: str = ""


@dataclass(eq=False)
class JobsTable(JobStore):
    """The jobs of one table, shared with other runs and with native workers.

    Parameters
    ----------
    spec : JobsTableSpec
        Where the table is and which keys it should hold.
    owner : Owner
        The run that reserves.
    max_priority : int, optional
        Reserve only jobs of this priority or a more urgent one.
    refreshing : Refreshing, optional
        How to refresh; None where a run takes the jobs as they are.
    patience_seconds : float
        How long to wait for a database that goes away after it was there.
    transactions : Transactions, optional
        Those of the run, which its tables share. Default: the table's own.
    """

    spec: JobsTableSpec
    owner: Owner = field(default_factory=lambda: Owner(SMALLEST_TOKEN))
    max_priority: int | None = None
    refreshing: Refreshing | None = None
    patience_seconds: float = 2.0
    transactions: Transactions | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.keeps_made = self.spec.keep_completed
        self._where = Conditions(self.spec, self.owner.token)
        self._shared = self.transactions or Transactions(self.spec.settings, self.patience_seconds)
        trouble = f"The jobs table {self._where.table} can't be reached or changed"
        self._transactions = TransactionsOn(self._shared, trouble)
        self._changes = Changes(self._where, self._transactions)
        self._workers = DeadWorkers(self._where, self._transactions)
        self._is_quiet = self._reserves_at_once = False
        self._rescued_at = float("-inf")

    def __reduce__(self) -> tuple[Any, ...]:
        how = self.max_priority, self.refreshing, self.patience_seconds, self._shared
        return JobsTable, (self.spec, self.owner, *how)

    def refresh(self) -> dict[str, int]:
        """Bring the jobs up to date with the key source and the target, if the run wants that.

        Returns
        -------
        dict
            How many jobs were ``added``, ``removed``, ``orphaned`` and ``re_pended``.
        """
        rescued = 0 if self._is_rescued else self.rescue()
        if self.refreshing is None:
            return {"added": 0, "removed": 0, "orphaned": rescued, "re_pended": 0}
        with self._shared.one_slow():
            counts = refresh(
                self._where, self._changes, self._transactions, self.refreshing, looks_first=self._is_quiet
            )
        self._is_quiet = not counts["added"]
        return counts | {"orphaned": rescued + counts["orphaned"]}

    @property
    def _is_rescued(self) -> bool:
        """Whether a run that watches, whose lease looks for ended ones as well, has done so shortly ago."""
        pause_seconds = lease_seconds_of(self.owner.token) / 2
        return self._shared.outlasts and time.monotonic() - self._rescued_at < pause_seconds

    def add_new(self, parents: Sequence[Job]) -> int | None:
        if self.refreshing is None:
            return 0
        return add_new(self._where, self._changes, self._transactions, self.refreshing, parents)

    def retry(self, condition: str) -> int:
        """Put the errors that fulfil a condition in SQL back to pending; return how many."""
        errors = self._update.where(self._where.columns.status == "error", verbatim(condition))
        return self._transactions.execute(errors.values(FRESH))

    def ignore(self, condition: str) -> int:
        """Leave pending jobs and errors that fulfil a condition in SQL out of all runs; return how many."""
        waiting = self._where.columns.status.in_(["pending", "error"])
        ignore = self._update.where(waiting, verbatim(condition)).values(status="ignore")
        return self._transactions.execute(ignore)

    def reserve(self, limit: int, max_priority: int | None = None) -> list[Job]:
        most_urgent = self._most_urgent
        if max_priority is not None:
            most_urgent = most_urgent.where(self._where.columns.priority <= max_priority)

        if self._reserves_at_once:
            return self._transactions.run_one(partial(self._reserve_at_once, most_urgent, limit))

        def reserve(connection: sa.Connection) -> list[Job]:
            found = self._changes.jobs_in(connection.execute(self._by_index(most_urgent), {"limit": limit}))
            changes = [self._reservation.where(self._where.among(batch)) for batch in batches(found)]
            self._check_hits(sum(connection.execute(change).rowcount for change in changes), found)
            return found

        found = self._transactions.run(reserve)
        is_plain = self.spec.settings.backend == "postgresql" and self.spec.restricted_sql is None
        may_not_be_found = any(isinstance(value, float) for job in found for value in job.key.values())
        self._reserves_at_once = is_plain and bool(found) and not may_not_be_found
        return found

    def _reserve_at_once(self, due: sa.Select[Any], limit: int, connection: sa.Connection) -> list[Job]:
        """Reserve by one statement; PostgreSQL returns the rows that it has changed in no order."""
        urgency = self._where.columns.priority, self._where.columns.scheduled_time
        reserve = self._changes.changed(self._reservation, due.add_columns(*urgency), "sort")
        rows = sorted(connection.execute(reserve, {"limit": limit}), key=lambda row: row[-len(urgency) :])
        return [Job(self.spec.table, dict(zip(self.spec.key, row, strict=False))) for row in rows]

    def next_priority(self) -> int | None:
        query = self._by_index(self.next_due_priority)
        return self._transactions.run_one(lambda connection: connection.execute(query).scalar())

    def _by_index(self, query: sa.Select[Any]) -> sa.Select[Any]:
        """Keep PostgreSQL from sorting all that is pending."""
        if self.spec.restricted_sql is not None:
            return query
        return discouraging(query, self.spec.settings.backend, "sort")

    def reserved(self) -> list[Job]:
        return self._changes.found(*self._where.mine)

    def release(self, jobs: Sequence[Job], *, delay_seconds: float = 0) -> int:
        due = {"scheduled_time": in_seconds(delay_seconds)} if delay_seconds else {}
        return self._changes.change_owned(jobs, self._update.values(UNRESERVED | due))

    def release_waiting(self, jobs: Sequence[Job]) -> list[Job]:
        waiting = [*self._where.owned, self._where.columns.pid == 0]
        return self._changes.change_unlocked(jobs, waiting, self._free)

    def release_all(self) -> None:
        mine = self._where.columns.connection_id == self.owner.token
        self._changes.change_all(lambda status: [status == "reserved", mine], self._free)

    def fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> bool:
        message, stack = _storable(failure.message), pack_text(_storable(failure.traceback))
        error = {"status": "error", "completed_time": NOW, "error_stack": stack, "host": host, "pid": pid}
        change = self._update.where(self._where.among([job]), *self._where.owned).values(error)
        try:
            hits = self._transactions.execute(change.values(error_message=_shortened(message)))
        except DatabaseError as refusal:
            if not isinstance(refusal.__cause__, sa.exc.DataError):  # a character that the column can't hold
                raise
            plain = message.encode("ascii", "backslashreplace").decode()
            hits = self._transactions.execute(change.values(error_message=_shortened(plain)))
        return bool(hits) or self._has_failed(job)

    def _has_failed(self, job: Job) -> bool:
        """Return whether an error was recorded, though the answer of the server was lost."""
        jobs = self._where.columns
        mine = [jobs.status == "error", jobs.connection_id == self.owner.token]
        return bool(self._changes.found(*mine, self._where.among([job])))

    def note(self, jobs: Sequence[Job], text: str) -> None:
        """Write a text where DataJoint has errors, which it reads of jobs that are errors only."""
        status = without_index(self._where.columns.status)
        mine = [self._where.columns.connection_id == self.owner.token, status.in_(["reserved", "success"])]
        note = self._update.where(*mine).values(error_message=_shortened(text))
        for batch in batches(jobs):
            self._transactions.execute(note.where(self._where.among(batch)))

    def forget(self, job: Job) -> None:
        """Nothing to do: the worker did it in ``make()``'s transaction."""

    def renew(self, jobs: Sequence[Job]) -> list[Job]:
        renew = self._update.values(reserved_time=NOW)
        renewed = self._changes.change_unlocked(jobs, self._where.owned, renew)
        return list(jobs) if len(renewed) == len(jobs) else self._changes.owned_among(jobs)

    def note_rescued(self) -> None:
        """Note that no lease was found to be over, which spares a refresh that comes soon the look."""
        self._rescued_at = time.monotonic()

    @cached_property
    def any_expired(self) -> sa.Select[Any]:
        """The query of one reservation whose lease is over."""
        expired = self._where.expired(self._where.columns.status)
        return sa.select(sa.literal_column("1").label("expired")).where(*expired).limit(1)

    def rescue(self) -> int:
        self.note_rescued()
        status = self._where.columns.status
        expired, still = self._where.expired(status), self._where.expired(without_index(status))
        found = self._changes.found(*expired)
        self._finish_those_made(found, still)
        workers = self._workers.that_begun(expired) if found else []
        rescued = self._changes.change_unlocked(found, still, self._free)
        if rescued:
            self._workers.end_unless_alive(workers)
            logger.warning("Rescued %d jobs of %s from a run that died", len(rescued), self.spec)
        return len(rescued)

    def begun(self, jobs: Sequence[Job]) -> list[Job]:
        return self._changes.owned_among(jobs, self._where.columns.pid != 0)

    def handed_back(self, jobs: Sequence[Job]) -> bool:
        return bool(self._changes.owned_among(jobs, self._where.columns.host == ""))

    def begun_by(self, host: str, pid: int) -> list[Job]:
        jobs = self._where.columns
        return self._changes.found(*self._where.mine, jobs.host == host, jobs.pid == pid)

    def end_sessions(self, jobs: Sequence[Job]) -> None:
        """End what the server still has of a dead worker, which may never tell that it has lost power.

        A worker that has begun other jobs is none that died over these.
        """
        lost = {job.identity for job in jobs}
        for worker in self._workers.that_begun([self._where.among(jobs), *self._where.owned]):
            if {job.identity for job in self.begun_by(worker.host, worker.pid)} <= lost:
                self._workers.end(worker)

    def pending(self, most: int | None = None) -> int:
        due: sa.Select[Any] = sa.select(sa.literal_column("1").label("due"))
        few = due.where(*self._due).limit(most).subquery()
        count = sa.select(sa.func.count()).select_from(few)
        with self._shared.one_slow() if most is None else nullcontext():
            return self._transactions.number(count)

    def held_by_others(self) -> int:
        jobs = self._where.columns
        others = [jobs.status == "reserved", jobs.connection_id != self.owner.token, *self._where.restricted]
        count = sa.select(sa.func.count()).select_from(jobs.status.table).where(*others, self._where.is_held)
        return self._transactions.number(count)

    def held_back(self) -> dict[str, int]:
        backend = self.spec.settings.backend
        counts = {
            following.parent: self._transactions.number(coming_of_failed(following, backend))
            for following in self.spec.held_back
            if self._transactions.number(any_failed(following))  # the other query reads whole tables
        }
        return {table: count for table, count in counts.items() if count}

    def assume_reached(self) -> None:
        self._shared.assume_reached()

    def wait_while(self, wanted: Callable[[], bool]) -> None:
        self._shared.wait_while(wanted)

    def close(self) -> None:
        self._shared.close()

    def job_statements(self) -> JobStatements:
        """Return the statements of the run's workers."""
        return job_statements(self._where, self.owner.token)

    @property
    def _update(self) -> sa.Update:
        return sa.update(self._where.table)

    @property
    def _free(self) -> sa.Update:
        return self._update.values(UNRESERVED)

    @property
    def _due(self) -> Where:
        return self._where.due(self.max_priority)

    @cached_property
    def _most_urgent(self) -> sa.Select[Any]:
        due = self._by_urgency(self._where.keys(*self._due))
        # runs that reserve at the same time take different jobs, and none waits for another one
        return due.limit(sa.bindparam("limit", type_=sa.Integer)).with_for_update(skip_locked=True)

    @cached_property
    def next_due_priority(self) -> sa.Select[Any]:
        """The query of the priority of the most urgent job that the run may reserve now."""
        priorities: sa.Select[Any] = sa.select(self._where.columns.priority).where(*self._due)
        return self._by_urgency(priorities).limit(1)

    def _by_urgency(self, jobs: sa.Select[Any]) -> sa.Select[Any]:
        return jobs.order_by(self._where.columns.priority, self._where.columns.scheduled_time)

    @cached_property
    def _reservation(self) -> sa.Update:
        reservation = {
            "status": "reserved",
            "reserved_time": NOW,
            "connection_id": self.owner.token,
            "user": self.owner.user,
            "version": self.owner.version,
            "host": platform.node(),
            "pid": 0,
        }
        return self._update.values(reservation)

    def _finish_those_made(self, jobs: Sequence[Job], conditions: Where) -> None:
        """Finish jobs whose key somebody has made without them."""
        if self.spec.several_keys_per_job:  # some of a job's keys may be missing
            return
        success = self._update.values(status="success", completed_time=NOW)
        end = success if self.spec.keep_completed else sa.delete(self._where.table)
        self._changes.change_unlocked(jobs, [*conditions, self._where.is_made], end)

    def _check_hits(self, hits: int, jobs: Sequence[Job]) -> None:
        if hits != len(jobs):
            raise DatabaseError(
                f"{len(jobs) - hits} jobs of {self.spec} can't be found by their key, such as "
                f"{jobs[0]}: a float is not equal to what it was stored as. Make the key of decimals."
            )


def _storable(text: str) -> str:
    """Replace what a text column refuses: NUL and lone surrogates."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def _shortened(message: str) -> str:
    if len(message) <= ERROR_MESSAGE_LENGTH:
        return message
    return message[: ERROR_MESSAGE_LENGTH - len(TRUNCATED)] + TRUNCATED
