"""The jobs table ``~~table_name`` of DataJoint, through SQLAlchemy."""

import logging
import operator
import platform
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from djdist._job import Failure, Job
from djdist._job_store import JobStore
from djdist.database import silence
from djdist.database.dbapi import ConnectionSettings, connect, shut
from djdist.database.errors import RIGHTS, is_denial, is_full, is_infrastructure, limit_of
from djdist.database.fence import Fence, Statement, are_searched_as_list, key_name
from djdist.database.marks import BEARERS, END, number_of, worker_mark
from djdist.database.sessions import SNAPSHOT_OFF, prepare, server_time
from djdist.database.silence import Line, bear, server_name
from djdist.errors import DatabaseError
from djdist.job_stores.blob import pack_text
from djdist.job_stores.errand import Errand, Hand
from djdist.job_stores.turn import turn
from djdist.pipeline.jobs_table_source import JobsTableSource

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Condition = Callable[[sa.ColumnElement[Any]], Sequence[sa.ColumnElement[bool]]]

SMALLEST_TOKEN = 2**40
LEASE_RANGE = 2**16
ERROR_MESSAGE_LENGTH = 2047
DRIVERS_RIGHTS = f"A driver needs SELECT, INSERT, UPDATE and DELETE on it. {RIGHTS}"
TRUNCATED = "...truncated"
BATCH = 500
FIRST_PATIENCE_SECONDS = 2.0
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
LOOK_SECONDS = 0.5
LAST_SECONDS = 3.0

NOW: sa.ColumnElement[Any] = sa.literal_column("CURRENT_TIMESTAMP(3)")
COLUMNS = (
    "status", "priority", "created_time", "scheduled_time", "reserved_time", "completed_time", "duration",
    "error_message", "error_stack", "user", "host", "pid", "connection_id", "version",
)  # fmt: skip
UNRESERVED = {
    "status": "pending",
    "reserved_time": None,
    "user": "",
    "host": "",
    "pid": 0,
    "connection_id": 0,
    "version": "",
}
FRESH = UNRESERVED | {
    "created_time": NOW, "scheduled_time": NOW, "completed_time": None,
    "duration": None, "error_message": "", "error_stack": None,
}  # fmt: skip


def new_token(lease_seconds: int) -> int:
    """Draw a run's token, which no native worker's connection id can equal.

    Its last 16 bits say for how long a reservation lives without renewal, so that
    whoever rescues it needs to know nothing else.
    """
    random = SMALLEST_TOKEN // LEASE_RANGE + secrets.randbelow(2**46)
    return random * LEASE_RANGE + lease_seconds


@dataclass(frozen=True)
class Owner:
    """Whose reservations they are; recorded in the jobs table."""

    token: int
    user: str = ""
    version: str = ""


@dataclass(frozen=True)
class Refreshing:
    """How to refresh; ``stale_seconds`` and ``orphan_seconds`` of 0 spare such jobs."""

    priority: int
    delay_seconds: float = 0
    stale_seconds: float = 0
    orphan_seconds: float = 0


@dataclass(eq=False)
class JobsTable(JobStore):
    """The jobs of one table, shared with other runs and with native workers.

    Parameters
    ----------
    source : JobsTableSource
        Where the table is and which keys it should hold.
    owner : Owner
        The run that reserves.
    max_priority : int, optional
        Reserve only jobs of this priority or a more urgent one.
    refreshing : Refreshing, optional
        How to refresh; None where a run takes the jobs as they are.
    patience_seconds : float
        How long to wait for a database that goes away after it was there.
    """

    source: JobsTableSource
    owner: Owner = field(default_factory=lambda: Owner(SMALLEST_TOKEN))
    max_priority: int | None = None
    refreshing: Refreshing | None = None
    patience_seconds: float = 2.0
    _reached: bool = field(default=False, init=False, repr=False, compare=False)
    _goes_on: Callable[[], bool] = field(
        default_factory=lambda: lambda: True, init=False, repr=False, compare=False
    )
    _open_engine: sa.Engine | None = field(default=None, init=False, repr=False, compare=False)

    _hands: list[Hand] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        columns: list[sa.Column[Any]] = [self._key_column(name) for name in self.source.key]
        columns += [sa.Column(name) for name in COLUMNS]
        self._jobs = sa.Table(self.source.jobs_table, sa.MetaData(), *columns, schema=self.source.schema)

    def __reduce__(self) -> tuple[Any, ...]:
        return JobsTable, (self.source, self.owner, self.max_priority, self.refreshing, self.patience_seconds)

    def refresh(self) -> dict[str, int]:
        """Bring the jobs up to date with the key source and the target, if the run wants that.

        Returns
        -------
        dict
            How many jobs were ``added``, ``removed``, ``orphaned`` and ``re_pended``.
        """
        orphaned = self.rescue()
        if self.refreshing is None:
            return {"added": 0, "removed": 0, "orphaned": orphaned, "re_pended": 0}
        options = self.refreshing
        return {
            "orphaned": orphaned + self._free_orphans(options.orphan_seconds),
            "added": self._add(options.priority, options.delay_seconds),
            "re_pended": self._repend_completed(options.priority) if self.source.keep_completed else 0,
            "removed": self._remove_vanished() + self._remove_stale(options.stale_seconds),
        }

    def retry(self, condition: str) -> int:
        """Put the errors that fulfil a condition in SQL back to pending; count them."""
        errors = sa.update(self._jobs).where(self._jobs.c.status == "error", _verbatim(condition))
        return self._execute(errors.values(FRESH))

    def ignore(self, condition: str) -> int:
        """Leave pending jobs and errors that fulfil a condition in SQL out of all runs; count them."""
        waiting = self._jobs.c.status.in_(["pending", "error"])
        return self._execute(
            sa.update(self._jobs).where(waiting, _verbatim(condition)).values(status="ignore")
        )

    def reserve(self, limit: int) -> list[Job]:
        def reserve(connection: sa.Connection) -> list[Job]:
            if self.source.restricted_sql is None:
                self._discourage(connection, "sort")
            found = _jobs_in(connection.execute(self._most_urgent, {"limit": limit}))
            changes = [self._reservation.where(self._among(batch)) for batch in _batches(found)]
            self._check_hits(sum(connection.execute(change).rowcount for change in changes), found)
            return found

        return self._transact(reserve)

    def reserved(self) -> list[Job]:
        return self._found(sa.select(*self._key()).where(*self._mine))

    def release(self, jobs: Sequence[Job], *, delay_seconds: float = 0) -> int:
        due = {"scheduled_time": shifted(NOW, sa.literal(delay_seconds))} if delay_seconds else {}
        return self._change_owned(jobs, sa.update(self._jobs).values(UNRESERVED | due))

    def release_waiting(self, jobs: Sequence[Job]) -> list[Job]:
        waiting, free = [*self._owned(), self._jobs.c.pid == 0], sa.update(self._jobs).values(UNRESERVED)
        return [job for batch in _batches(jobs) for job in self._change_unlocked(batch, waiting, free)]

    def release_all(self) -> None:
        mine = self._jobs.c.connection_id == self.owner.token
        self._change(lambda status: [status == "reserved", mine], sa.update(self._jobs).values(UNRESERVED))

    def fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> bool:
        message, stack = _storable(failure.message), pack_text(_storable(failure.traceback))
        error = {"status": "error", "completed_time": NOW, "error_stack": stack, "host": host, "pid": pid}
        change = sa.update(self._jobs).where(self._among([job]), *self._owned()).values(error)
        try:
            hits = self._execute(change.values(error_message=_shortened(message)))
        except DatabaseError as refusal:
            if not isinstance(refusal.__cause__, sa.exc.DataError):
                raise
            plain = message.encode("ascii", "backslashreplace").decode()
            hits = self._execute(change.values(error_message=_shortened(plain)))
        return bool(hits) or self._has_failed(job)

    def _has_failed(self, job: Job) -> bool:
        """Tell whether an error was recorded, though the answer of the server was lost."""
        mine = self._jobs.c.connection_id == self.owner.token
        errors = sa.select(*self._key()).where(self._jobs.c.status == "error", mine, self._among([job]))
        return bool(self._found(errors))

    def finish(self, job: Job) -> None:
        """Nothing to do: the worker did it in ``make()``'s transaction."""

    def renew(self, jobs: Sequence[Job]) -> list[Job]:
        renew = sa.update(self._jobs).values(reserved_time=NOW)
        renewed = sum(len(self._change_unlocked(batch, self._owned(), renew)) for batch in _batches(jobs))
        return list(jobs) if renewed == len(jobs) else self._owned_among(jobs)

    def rescue(self) -> int:
        found = self._found(sa.select(*self._key()).where(*self._expired(self._jobs.c.status)))
        still, free = self._expired(_unindexed(self._jobs.c.status)), sa.update(self._jobs).values(UNRESERVED)
        self._finish_those_made(found, still)
        workers = self._workers(*self._expired(self._jobs.c.status)) if found else []
        rescued = sum(len(self._change_unlocked(batch, still, free)) for batch in _batches(found))
        if rescued:
            self._end_unless_alive(workers)
            logger.warning("Rescued %d jobs of %s from a run that died", rescued, self.source.name)
        return rescued

    def _end_unless_alive(self, workers: Sequence[Any]) -> None:
        """End the sessions of workers of dead runs, but of none that still holds a job."""
        jobs = self._jobs.c
        for worker in workers:
            same = [jobs[name] == value for name, value in worker._mapping.items()]
            if not self._workers(jobs.status == "reserved", *same):
                self._end_session(worker)

    def begun(self, jobs: Sequence[Job]) -> list[Job]:
        return self._owned_among(jobs, self._jobs.c.pid != 0)

    def forgone(self, jobs: Sequence[Job]) -> bool:
        return bool(self._owned_among(jobs, self._jobs.c.host == ""))

    def begun_by(self, host: str, pid: int) -> list[Job]:
        here = [self._jobs.c.host == host, self._jobs.c.pid == pid]
        return self._found(sa.select(*self._key()).where(*self._mine, *here))

    def end_sessions(self, jobs: Sequence[Job]) -> None:
        """End what the server still has of a dead worker, which may never tell that it has lost power.

        A worker that has begun other jobs is none that died over these.
        """
        lost = {job.identity for job in jobs}
        for worker in self._workers(self._among(jobs), *self._owned()):
            if {job.identity for job in self.begun_by(worker.host, worker.pid)} <= lost:
                self._end_session(worker)

    def _workers(self, *conditions: sa.ColumnElement[bool]) -> list[Any]:
        jobs = self._jobs.c
        begun = sa.select(jobs.connection_id, jobs.host, jobs.pid).where(jobs.pid != 0, *conditions)
        rows = self._transact(lambda connection: list(connection.execute(begun)))
        return list(dict.fromkeys(rows))  # DISTINCT might make PostgreSQL sort them

    def _end_session(self, worker: Any) -> None:
        backend, mark = self.source.settings.backend, worker_mark(*worker)

        def end(connection: sa.Connection) -> None:
            for (session,) in connection.exec_driver_sql(BEARERS[backend].format(mark)).fetchall():
                if session is not None:
                    self._end(connection, session, worker)

        self._transact(end)

    def _end(self, connection: sa.Connection, session: int, worker: Any) -> None:
        statement = END[self.source.settings.backend].format(session)
        of_whom = f"{worker.host} (pid {worker.pid})"
        try:
            with connection.begin_nested():
                connection.exec_driver_sql(statement)
        except sa.exc.DBAPIError as error:
            message = "Session %s of a dead worker on %s keeps its locks until somebody ends it by %s: %s"
            logger.warning(message, session, of_whom, statement, error.orig)
        else:
            logger.warning("Ended session %s of a dead worker on %s, with its locks", session, of_whom)

    def pending(self, most: int | None = None) -> int:
        due: sa.Select[Any] = sa.select(sa.literal_column("1").label("due")).where(*self._due()).limit(most)
        count = sa.select(sa.func.count()).select_from(due.subquery())
        return self._transact(lambda connection: int(connection.execute(count).scalar_one()))

    def assume_reached(self) -> None:
        self._reached = True

    def wait_while(self, wanted: Callable[[], bool]) -> None:
        self._goes_on = wanted

    def close(self) -> None:
        while self._hands:
            self._hands.pop().let_go()
        if self._open_engine is not None:
            self._open_engine.dispose()
            self._open_engine = None

    def fence(self) -> Fence:
        """Give the workers their statements."""
        jobs = self._jobs.c
        key = sa.and_(*[jobs[name] == sa.bindparam(key_name(name)) for name in self.source.key])
        mine = [
            _unindexed(jobs.status) == sa.literal_column("'reserved'"),
            jobs.connection_id == sa.bindparam("token"),
        ]
        worker: dict[str, Any] = {"host": sa.bindparam("worker_host"), "pid": sa.bindparam("worker_pid")}
        begun_here = [jobs[name] == parameter for name, parameter in worker.items()]
        success: dict[str, Any] = {
            "status": sa.literal_column("'success'"),
            "completed_time": sa.literal_column(
                server_time(self.source.settings.backend, self.source.time_zone)
            ),
            "duration": sa.bindparam("seconds"),
        }
        finish = (
            sa.update(self._jobs).values(success) if self.source.keep_completed else sa.delete(self._jobs)
        )
        nobody: dict[str, Any] = {"host": sa.literal_column("''"), "pid": sa.literal_column("0")}
        not_begun = jobs.pid == sa.literal_column("0")
        held: sa.Select[Any] = sa.select(sa.literal_column("1")).where(*mine, *begun_here)
        return Fence(
            token=self.owner.token,
            key=self._statement(key.self_group()),
            key_columns=self._statement(sa.tuple_(*self._key())).sql,
            begin=self._statement(sa.update(self._jobs).where(*mine, not_begun).values(worker)),
            held=self._statement(held),
            made=self._statement(held.where(self._in_target(self._jobs))),
            forgo=self._statement(sa.update(self._jobs).where(*mine, *begun_here).values(nobody)),
            finish=self._unhindered(self._statement(finish.where(*mine, *begun_here, key))),
        )

    def _unhindered(self, finish: Statement) -> Statement:
        """Let the last statement of ``make()``'s transaction change a job that was renewed meanwhile."""
        if self.source.settings.backend == "postgresql":
            return finish  # the transaction itself allows it
        return replace(finish, sql=f"{SNAPSHOT_OFF} {finish.sql}")

    def _expired(self, status: sa.ColumnElement[Any]) -> list[sa.ColumnElement[bool]]:
        jobs = self._jobs.c
        expired = jobs.reserved_time < shifted(NOW, -(jobs.connection_id % LEASE_RANGE))
        return [status == "reserved", jobs.connection_id >= SMALLEST_TOKEN, expired]

    def _change_unlocked(
        self, jobs: Sequence[Job], conditions: Sequence[sa.ColumnElement[bool]], change: sa.Update | sa.Delete
    ) -> list[Job]:
        """Change jobs and give them, but for locked ones, whose worker may be frozen before its COMMIT."""
        unlocked = sa.select(*self._key()).where(self._among(jobs), *conditions)

        def change_found(connection: sa.Connection) -> list[Job]:
            found = _jobs_in(connection.execute(unlocked.with_for_update(skip_locked=True)))
            if found:
                connection.execute(change.where(self._among(found)))
            return found

        return self._transact(change_found)

    def _finish_those_made(self, jobs: Sequence[Job], conditions: Sequence[sa.ColumnElement[bool]]) -> None:
        """Finish jobs whose key somebody has made without them."""
        if self.source.finer_source:  # some of a job's keys may be missing
            return
        success = sa.update(self._jobs).values(status="success", completed_time=NOW)
        made = [*conditions, self._in_target(self._jobs)]
        for batch in _batches(jobs):
            self._change_unlocked(
                batch, made, success if self.source.keep_completed else sa.delete(self._jobs)
            )

    def _check_hits(self, hits: int, jobs: Sequence[Job]) -> None:
        if hits != len(jobs):
            raise DatabaseError(
                f"{len(jobs) - hits} jobs of {self.source.name} can't be found by their key, such as "
                f"{jobs[0]}: a float is not equal to what it was stored as. Make the key of decimals."
            )

    def _key_column(self, name: str) -> sa.Column[Any]:
        return sa.Column(name, BinaryUuid() if name in self.source.uuids else sa.types.NullType())

    def _key(self) -> list[sa.Column[Any]]:
        return [self._jobs.c[name] for name in self.source.key]

    def _among(self, jobs: Sequence[Job]) -> sa.ColumnElement[bool]:
        """Find jobs by their key, if possible in a form that is compiled once however many they are."""
        key, values = self._key(), [tuple(job.key[name] for name in self.source.key) for job in jobs]
        if not are_searched_as_list(values):
            return sa.or_(*[sa.and_(*map(operator.eq, key, value)) for value in values])
        return key[0].in_([value for (value,) in values]) if len(key) == 1 else sa.tuple_(*key).in_(values)

    @property
    def _mine(self) -> tuple[sa.ColumnElement[bool], ...]:
        """All reservations of the run, found by the index on status."""
        return self._jobs.c.status == "reserved", self._jobs.c.connection_id == self.owner.token

    def _owned(self) -> tuple[sa.ColumnElement[bool], ...]:
        return _unindexed(self._jobs.c.status) == "reserved", self._jobs.c.connection_id == self.owner.token

    @cached_property
    def _most_urgent(self) -> sa.Select[Any]:
        jobs = self._jobs.c
        due = sa.select(*self._key()).where(*self._due()).order_by(jobs.priority, jobs.scheduled_time)
        return due.limit(sa.bindparam("limit", type_=sa.Integer)).with_for_update(skip_locked=True)

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
        return sa.update(self._jobs).values(reservation)

    def _due(self) -> list[sa.ColumnElement[bool]]:
        jobs = self._jobs.c
        due = [jobs.status == "pending", jobs.scheduled_time <= NOW]
        if self.max_priority is not None:
            due.append(jobs.priority <= self.max_priority)
        if self.source.restricted_sql is not None:
            due.append(self._in(self._keys(self.source.restricted_sql)))
        return due

    def _discourage(self, connection: sa.Connection, step: str) -> None:
        """Keep PostgreSQL from a plan that its statistics suggest until it has seen a refresh's new jobs."""
        if self.source.settings.backend == "postgresql":
            connection.execute(sa.text(f"SET LOCAL enable_{step} = off"))

    def _keys(self, query: str) -> sa.Subquery:
        names = dict.fromkeys(self.source.key + self.source.target_key)
        return _verbatim(query).columns(*[sa.column(name) for name in names]).subquery("keys_to_make")

    def _in(self, keys: sa.FromClause) -> sa.ColumnElement[bool]:
        return sa.exists().where(_are_same(keys, self._jobs, self.source.key))

    def _in_target(self, keys: sa.FromClause) -> sa.ColumnElement[bool]:
        names = [name for name in self.source.target_key if name in keys.c]
        columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in names]
        target = sa.table(self.source.target_table, *columns, schema=self.source.schema)
        return sa.exists().select_from(target).where(_are_same(target, keys, names))

    def _wanted(self) -> sa.Subquery:
        return self._keys(self.source.restricted_sql or self.source.key_source_sql)

    def _add(self, priority: int, delay_seconds: float) -> int:
        columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in self.source.key]
        keys = _verbatim(self.source.new_keys_sql).columns(*columns).subquery("new_keys")
        due = shifted(NOW, sa.literal(delay_seconds))
        rows = sa.select(*keys.c, sa.literal("pending"), sa.literal(priority), due)
        return self._insert_missing([*self.source.key, "status", "priority", "scheduled_time"], rows)

    def _insert_missing(self, names: list[str], rows: sa.Select[Any]) -> int:
        """Insert all at once, and leave alone what another refresh has added meanwhile.

        PostgreSQL is first asked to insert without looking for that, in two thirds of the time.
        """
        if self.source.settings.backend == "mysql":
            same = {self.source.key[0]: self._jobs.c[self.source.key[0]]}
            return self._add_all(
                mysql.insert(self._jobs).from_select(names, rows).on_duplicate_key_update(same)
            )
        try:
            return self._add_all(sa.insert(self._jobs).from_select(names, rows))
        except DatabaseError as refusal:
            if not isinstance(refusal.__cause__, sa.exc.IntegrityError):
                raise
        return self._add_all(postgresql.insert(self._jobs).from_select(names, rows).on_conflict_do_nothing())

    def _add_all(self, insert: sa.Executable) -> int:
        """Add jobs without reading the jobs table, empty as it may have been, again for every key."""

        def add(connection: sa.Connection) -> int:
            self._discourage(connection, "nestloop")
            with turn(connection, self.source.settings.backend, str(self._jobs)), self._lenient(connection):
                return int(connection.execute(insert).rowcount)

        return self._transact(add)

    def _repend_completed(self, priority: int) -> int:
        wanted = self._in(self._wanted())
        return self._change(
            lambda status: [status == "success", wanted, ~self._in_target(self._jobs)],
            sa.update(self._jobs).values(FRESH | {"priority": priority}),
        )

    def _remove_vanished(self) -> int:
        return self._change(
            lambda status: [status.in_(["success", "error"]), self._unwanted(), ~self._in_target(self._jobs)],
            sa.delete(self._jobs),
        )

    def _remove_stale(self, stale_seconds: float) -> int:
        if not stale_seconds:
            return 0
        old = self._jobs.c.created_time < shifted(NOW, sa.literal(-stale_seconds))
        return self._change(
            lambda status: [status.in_(["pending", "success", "error"]), old, self._unwanted()],
            sa.delete(self._jobs),
        )

    def _unwanted(self) -> sa.ColumnElement[bool]:
        return ~self._in(self._keys(self.source.key_source_sql))

    def _free_orphans(self, orphan_seconds: float) -> int:
        if not orphan_seconds:
            return 0
        native = self._jobs.c.connection_id < SMALLEST_TOKEN
        old = self._jobs.c.reserved_time < shifted(NOW, sa.literal(-orphan_seconds))
        return self._change(
            lambda status: [status == "reserved", native, old], sa.update(self._jobs).values(UNRESERVED)
        )

    def _change(self, condition: Condition, change: sa.Update | sa.Delete) -> int:
        """Change all jobs for whose status, and more, a condition holds.

        They are found by a read that locks nothing, then locked by their key as workers lock
        theirs. Locked by the index on status, driver and worker could wait for each other.
        """
        rows = sa.select(*self._key()).where(*condition(self._jobs.c.status))
        found = self._found(rows)
        still = condition(_unindexed(self._jobs.c.status))

        def change_batch(connection: sa.Connection, batch: Sequence[Job]) -> int:
            with self._lenient(connection):
                return int(connection.execute(change.where(self._among(batch), *still)).rowcount)

        return sum(self._transact(partial(change_batch, batch=batch)) for batch in _batches(found))

    @contextmanager
    def _lenient(self, connection: sa.Connection) -> Iterator[None]:
        """Let MySQL work out a key source in a change as in a SELECT, where a division by zero gives NULL.

        In its strict mode, which keeps what is written right, the same division is an error there.
        """
        if self.source.settings.backend != "mysql":
            yield
            return
        connection.exec_driver_sql("SET @djdist_mode = @@sql_mode, SESSION sql_mode = 'ONLY_FULL_GROUP_BY'")
        try:
            yield
        finally:
            with suppress(sa.exc.DBAPIError):  # a connection that is gone took it along
                connection.exec_driver_sql("SET SESSION sql_mode = @djdist_mode")

    def _change_owned(self, jobs: Sequence[Job], change: sa.Update) -> int:
        owned = change.where(*self._owned())
        return sum(self._execute(owned.where(self._among(batch))) for batch in _batches(jobs))

    def _owned_among(self, jobs: Sequence[Job], *conditions: sa.ColumnElement[bool]) -> list[Job]:
        rows = sa.select(*self._key()).where(*self._owned(), *conditions)
        return [job for batch in _batches(jobs) for job in self._found(rows.where(self._among(batch)))]

    def _found(self, rows: sa.Select[Any]) -> list[Job]:
        return self._transact(lambda connection: _jobs_in(connection.execute(rows)))

    def _execute(self, statement: sa.Executable) -> int:
        return self._transact(lambda connection: int(connection.execute(statement).rowcount))

    def _transact(self, act: Callable[[sa.Connection], Result]) -> Result:
        """Do something in a transaction, again where the database was away or gave it up for another one."""
        began_at, told = time.monotonic(), False
        for pause_seconds in _pauses():
            try:
                result = self._in_time(act)
            except sa.exc.DBAPIError as error:
                waited_seconds = time.monotonic() + pause_seconds - began_at
                if error.orig is None or waited_seconds > self._patience_seconds(error.orig):
                    raise self._unreachable(error) from error
                if not self._goes_on():
                    raise self._unreachable(error) from error
                if pause_seconds >= 1 and not told:
                    logger.warning("Waiting for the database: %s", error.orig)
                    told = True
                self._engine().dispose()  # another server may have its address by now
                time.sleep(pause_seconds)
            else:
                if told:
                    logger.info("The database answers after %.0f s", time.monotonic() - began_at)
                self._reached = True
                return result
        raise AssertionError("unreachable")

    def _in_time(self, act: Callable[[sa.Connection], Result]) -> Result:
        """Do something in a transaction, and leave it where the run is to end before it is done."""
        engine, lines = self._engine(), list[Line]()

        def transact() -> Result:
            with engine.begin() as connection:
                lines.append(self._line_of(connection))
                return act(connection)

        hand = self._hands.pop() if self._hands else Hand()
        errand = hand.begin(transact)
        try:
            self._wait_for(errand, lines)
        finally:  # by a signal, too
            self._wait_no_longer(errand, hand, lines)
        if not errand.is_done:
            raise DatabaseError(
                f"The database gives no answer to {platform.node()}, which is waited for no longer."
            )
        return errand.result()

    def _wait_for(self, errand: Errand[Result], lines: Sequence[Line]) -> None:
        began_at, doubted = time.monotonic(), False
        while not errand.wait(LOOK_SECONDS) and self._goes_on():
            if lines and not doubted and time.monotonic() - began_at >= silence.DOUBT_SECONDS:
                doubted = True
                lines[0].doubt(lambda: not errand.is_done)

    def _wait_no_longer(self, errand: Errand[Result], hand: Hand, lines: Sequence[Line]) -> None:
        """Grant a COMMIT that is on its way a moment, then end its connection."""
        try:
            errand.wait(LAST_SECONDS)
        finally:
            if errand.is_done:
                self._hands.append(hand)
            else:
                for line in lines:
                    shut(line.connection)
                self._engine().dispose()  # nobody gets what the hand still holds
                hand.let_go()

    def _line_of(self, connection: sa.Connection) -> Line:
        raw = connection.connection.dbapi_connection
        return Line(raw, lambda: _connection(self.source.settings), connection.info["server"])

    def _patience_seconds(self, error: BaseException) -> float:
        if limit_of(error) or is_full(error):
            return self.patience_seconds
        if not is_infrastructure(error):
            return 0
        return self.patience_seconds if self._reached else FIRST_PATIENCE_SECONDS

    def _engine(self) -> sa.Engine:
        if self._open_engine is None:
            drivers = {"mysql": "mysql+pymysql://", "postgresql": "postgresql+psycopg2://"}
            self._open_engine = sa.create_engine(
                drivers[self.source.settings.backend],
                creator=lambda: _marked(_connection(self.source.settings)),
                isolation_level="READ COMMITTED",
                pool_size=2,
                max_overflow=0,
                pool_timeout=None,  # the loop, the lease and a count share them
                pool_reset_on_return=None,  # every transaction is ended already
            )
            sa.event.listen(self._open_engine, "connect", _note_server)
        return self._open_engine

    def _unreachable(self, error: sa.exc.DBAPIError) -> DatabaseError:
        where = f"{self.source.schema}.{self.source.jobs_table}"
        cause = str(error.orig).strip()
        trouble = f"The jobs table {where} can't be reached or changed from {platform.node()}: {cause}"
        denied = error.orig is not None and is_denial(error.orig)
        return DatabaseError(f"{trouble}\n{DRIVERS_RIGHTS}" if denied else trouble)

    def _statement(self, statement: sa.ClauseElement) -> Statement:
        dialects = {"mysql": mysql.dialect, "postgresql": postgresql.dialect}
        compiled = statement.compile(dialect=dialects[self.source.settings.backend](paramstyle="format"))
        assert isinstance(compiled, SQLCompiler) and compiled.positiontup is not None
        return Statement(str(compiled), tuple(compiled.positiontup))


class BinaryUuid(sa.types.TypeDecorator[UUID]):
    """A uuid as DataJoint keeps it on MySQL: binary(16)."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: UUID | None, dialect: sa.Dialect) -> bytes | None:
        return None if value is None else value.bytes

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> UUID | None:
        return None if value is None else UUID(bytes=value)


class shifted(FunctionElement[Any]):  # noqa: N801 - reads as an SQL function
    """A moment and the seconds to add to it."""

    inherit_cache = True


@compiles(shifted, "mysql", "mariadb")
def _shifted_in_mysql(element: shifted, compiler: SQLCompiler, **kw: Any) -> str:
    moment, seconds = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"({moment} + INTERVAL ({seconds}) SECOND)"


@compiles(shifted, "postgresql")
def _shifted_in_postgresql(element: shifted, compiler: SQLCompiler, **kw: Any) -> str:
    moment, seconds = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"({moment} + make_interval(secs => {seconds}))"


def _are_same(some: sa.FromClause, others: sa.FromClause, key: Iterable[str]) -> sa.ColumnElement[bool]:
    return sa.and_(*[some.c[name] == others.c[name] for name in key])


def _unindexed(status: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.func.concat(status)


def _jobs_in(rows: sa.CursorResult[Any]) -> list[Job]:
    names = tuple(map(str, rows.keys()))  # plain ones, or each worker would import SQLAlchemy for them
    return [Job(dict(zip(names, row, strict=True))) for row in rows]


def _batches(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    return (jobs[first : first + BATCH] for first in range(0, len(jobs), BATCH))


def _verbatim(sql: str) -> sa.TextClause:
    return sa.text(sql.replace(":", "\\:"))


def _pauses() -> Iterator[float]:
    seconds = FIRST_PAUSE_SECONDS
    while True:
        yield min(seconds, LONGEST_PAUSE_SECONDS)
        seconds *= 2


def _note_server(connection: Any, record: sa.pool.ConnectionPoolEntry) -> None:
    record.info["server"] = server_name(connection)


def _marked(connection: Any) -> Any:
    """Let what is left of a connection that falls silent be found, and ended with its locks."""
    bear(connection, number_of(uuid4().hex))
    return connection


def _connection(settings: ConnectionSettings) -> Any:
    connection = _opened(settings)
    prepare(connection, settings.backend)
    return connection


def _opened(settings: ConnectionSettings) -> Any:
    if settings.login is not None:
        return connect(settings.backend, settings.login, settings.charset)
    from djdist.shipping.packing import (
        open_dbapi_connection,  # it imports DataJoint, which takes half a second
    )

    return open_dbapi_connection(settings)


def _storable(text: str) -> str:
    """Replace what a text column refuses: NUL and lone surrogates."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def _shortened(message: str) -> str:
    if len(message) <= ERROR_MESSAGE_LENGTH:
        return message
    return message[: ERROR_MESSAGE_LENGTH - len(TRUNCATED)] + TRUNCATED
