"""Keys of one table that a worker makes in one transaction, as the database shows it."""

from __future__ import annotations

import datetime
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import datajoint as dj
import pytest

import lab as pipelines
from djdist._job import Job, Report
from djdist.job_stores.jobs_table.lease import new_token
from djdist.job_stores.jobs_table.store import JobsTable, Owner
from djdist.jobs.table import jobs_of, refreshing
from djdist.pipeline.jobs_table import jobs_table_spec
from djdist.shipping.packing import open_dbapi_connection, settings_of
from djdist.worker import Pace, WorkerContext, make_session, pace, sharing
from djdist.worker.make_session import MakeSession
from lab.doing import IMPATIENT
from lab.watching import wait_until
from servers import Server

KEYS = 6
ALL_MADE = ["MADE"] * KEYS


class Worker:
    """A worker in this process that makes the keys of `Scripted` as one group."""

    def __init__(self, lab: ModuleType, table: str = "Scripted", *, reserves: bool = True) -> None:
        pipelines.fill(lab, subjects=1, sessions=KEYS)
        self.lab, self.table = lab, getattr(lab, table)
        self.numbers: list[int] = []
        jobs = jobs_of(self.table())
        owner = Owner(new_token(60), "me", "v1")
        self.store = JobsTable(jobs_table_spec(jobs), owner, None, refreshing(jobs)) if reserves else None
        self.pace = Pace(KEYS)

    def make(self, do: Callable[..., None] | None = None, **arguments: Any) -> list[str]:
        """Make all keys, each with `do` in its make(), and tell how each ended, in the keys' order."""
        outcomes = self.report(do, **arguments).outcomes
        return [outcome.ending.name for outcome in sorted(outcomes, key=lambda outcome: str(outcome.job))]

    def report(self, do: Callable[..., None] | None = None, **arguments: Any) -> Report:
        def note_and_do(table: Any, key: dict[str, Any], n: int) -> None:
            self.numbers.append(n)
            if do:
                do(table, key, n, **arguments)

        table = self.table()
        make_kwargs = {"do": note_and_do} if self.table is self.lab.Scripted else {}
        statements = self.store.job_statements() if self.store else None
        context = WorkerContext(
            table,
            make_kwargs,
            settings_of(table.connection),
            statements=statements,
            own_connection=True,
            pace=self.pace,
        )
        report = context(self.reserved())
        table.connection.connect()
        return report

    def reserved(self) -> list[Job]:
        if self.store:
            self.store.refresh()
            return sorted(self.store.reserve(KEYS), key=str)
        return [Job(self.table.__name__, key) for key in self.table().key_source.keys(order_by="KEY")]


@pytest.fixture(params=[True, pytest.param(False, id="no-jobs-table", marks=pytest.mark.long)])
def worker(lab: ModuleType, request: pytest.FixtureRequest) -> Iterator[Worker]:
    worker = Worker(lab, reserves=request.param)
    yield worker
    if worker.store:
        worker.store.close()


@pytest.fixture
def reserving(lab: ModuleType) -> Iterator[Worker]:
    worker = Worker(lab)
    assert worker.store
    yield worker
    worker.store.close()


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys fit into one transaction, however long a busy machine takes."""
    for module in (sharing, pace):
        monkeypatch.setattr(module, "SHARED_SECONDS", 60.0)


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often shared transactions were committed."""
    found: list[str] = []
    commit = MakeSession.commit_shared

    def note_and_commit(session: MakeSession) -> None:
        found.append("commit")
        commit(session)

    monkeypatch.setattr(MakeSession, "commit_shared", note_and_commit)
    return found


def seen_from_outside(table: Any, sql: str) -> Any:
    """Ask the server in a session of its own."""
    other = open_dbapi_connection(settings_of(table.connection))
    cursor = other.cursor()
    cursor.execute(sql)
    rows = cursor.fetchall()
    other.close()
    return rows


def change_from_outside(table: Any, *statements: str) -> None:
    other = open_dbapi_connection(settings_of(table.connection))
    for sql in statements:
        other.cursor().execute(sql)
    other.commit()
    other.close()


def jobs_name(table: Any) -> str:
    return str(
        table.connection.adapter.make_full_table_name(table.database, f"~~{table.table_name.lstrip('_')}")
    )


def statuses(worker: Worker) -> list[str]:
    return sorted(jobs_of(worker.table()).to_arrays("status")) if worker.store else []


def test_keys_are_made_once_and_committed_together(worker: Worker, commits: list[str]) -> None:
    assert worker.make() == ALL_MADE
    assert worker.numbers == [*range(1, KEYS + 1)]
    assert len(worker.table()) == KEYS
    assert commits == ["commit"]
    assert statuses(worker) == []


def test_nothing_of_them_is_seen_before_the_commit(worker: Worker) -> None:
    seen: list[int] = []

    def look(table: Any, key: dict[str, Any], n: int) -> None:
        ((count,),) = seen_from_outside(table, f"SELECT count(*) FROM {table.full_table_name}")
        seen.append(count)

    assert worker.make(look) == ALL_MADE
    assert seen == [0] * KEYS


def fail_at(number: int, table: Any, key: dict[str, Any], n: int) -> None:
    if n == number:
        raise ValueError(f"session {n}")


@pytest.mark.parametrize(
    "number", [pytest.param(1, marks=pytest.mark.long), 4, pytest.param(KEYS, marks=pytest.mark.long)]
)
def test_a_key_that_fails_keeps_its_own_error_and_those_before_are_made(worker: Worker, number: int) -> None:
    report = worker.report(partial(fail_at, number))
    endings = [outcome.ending.name for outcome in report.outcomes]
    assert endings == ["MADE"] * (number - 1) + ["FAILED"] + ["NOT_STARTED"] * (KEYS - number)
    failure = report.outcomes[number - 1].failure
    assert failure
    assert failure.message == f"ValueError: session {number}"
    assert len(worker.table()) == number - 1


def test_a_job_that_was_taken_over_in_the_meantime_undoes_nobody_elses_key(reserving: Worker) -> None:
    def lose_the_second(table: Any, key: dict[str, Any], n: int) -> None:
        if n == 4 and reserving.numbers.count(4) == 1:
            change_from_outside(
                table, f"UPDATE {jobs_name(table)} SET connection_id = 1 WHERE session_date = '2026-01-02'"
            )

    endings = reserving.make(lose_the_second)
    assert endings == ["MADE", "LEASE_LOST"] + ["NOT_STARTED"] * (KEYS - 2)
    assert list(reserving.table().to_arrays("session_date")) == [pipelines.FIRST_DATE]
    assert statuses(reserving) == ["reserved"] * (KEYS - 1)


def test_jobs_that_were_renewed_in_the_meantime_are_finished(reserving: Worker, commits: list[str]) -> None:
    def renew(table: Any, key: dict[str, Any], n: int) -> None:
        if n == 3:
            change_from_outside(
                table, f"UPDATE {jobs_name(table)} SET reserved_time = reserved_time + INTERVAL '1' SECOND"
            )

    assert reserving.make(renew) == ALL_MADE
    assert reserving.numbers == [1, 2, 3, 4, 5, 6]
    assert commits == ["commit"]
    assert statuses(reserving) == []


def test_a_key_that_others_made_in_the_meantime_is_theirs(worker: Worker) -> None:
    def be_overtaken(table: Any, key: dict[str, Any], n: int) -> None:
        if n == 3 and worker.numbers.count(3) == 1:
            day = key["session_date"]
            change_from_outside(table, f"INSERT INTO {table.full_table_name} VALUES (1, '{day}', 0)")

    endings = worker.make(be_overtaken)
    assert endings == ["MADE", "MADE", "ALREADY_MADE", "MADE", "MADE", "MADE"]
    assert len(worker.table()) == KEYS
    assert statuses(worker) == []


def commit_at(number: int, table: Any, key: dict[str, Any], n: int) -> None:
    if n == number:
        table.connection.commit_transaction()


def commit_by_sql_and_go_on(number: int, table: Any, key: dict[str, Any], n: int) -> None:
    if n == number:
        table.connection.query("COMMIT")
        table.connection.query("START TRANSACTION")


def declare_at(number: int, table: Any, key: dict[str, Any], n: int) -> None:
    if n == number:
        name = table.connection.adapter.make_full_table_name(table.database, f"by_make_{n}")
        table.connection.query(f"CREATE TABLE IF NOT EXISTS {name} (n int)")


def roll_back_at(number: int, table: Any, key: dict[str, Any], n: int) -> None:
    if n == number:
        table.connection.cancel_transaction()
        table.connection.start_transaction()


def roll_back_by_sql(number: int, table: Any, key: dict[str, Any], n: int) -> None:
    if n == number:
        table.connection.query("ROLLBACK")


@pytest.mark.parametrize(
    "end", [commit_at, commit_by_sql_and_go_on, declare_at, roll_back_at, roll_back_by_sql]
)
@pytest.mark.parametrize(
    "number", [pytest.param(1, marks=pytest.mark.long), 3, pytest.param(KEYS, marks=pytest.mark.long)]
)
def test_a_make_that_ends_its_transaction_has_all_keys_made(
    server: Server, worker: Worker, end: Callable[..., None], number: int
) -> None:
    assert worker.make(partial(end, number)) == ALL_MADE
    assert len(worker.table()) == KEYS
    assert statuses(worker) == []
    is_ended = end is not declare_at or server.backend == "mysql"  # PostgreSQL declares in a transaction
    assert worker.pace.shares is not is_ended


def test_an_error_after_a_commit_of_its_own_is_the_keys_and_those_before_are_made(worker: Worker) -> None:
    def commit_and_fail(table: Any, key: dict[str, Any], n: int) -> None:
        if n == 4:
            table.insert1({**key, "pid": 0})
            table.connection.commit_transaction()
            raise ValueError("after the commit")

    assert worker.make(commit_and_fail) == ["MADE"] * 3 + ["FAILED"] + ["NOT_STARTED"] * 2
    assert worker.numbers == [1, 2, 3, 4]
    assert len(worker.table()) == 4


def test_a_make_may_not_begin_a_transaction_in_another_ones(worker: Worker) -> None:
    def begin(table: Any, key: dict[str, Any], n: int) -> None:
        if n == 2:
            table.connection.start_transaction()

    report = worker.report(begin)
    assert [outcome.ending.name for outcome in report.outcomes[:3]] == ["MADE", "FAILED", "NOT_STARTED"]
    assert report.outcomes[1].failure
    assert "Nested connections" in report.outcomes[1].failure.message


def test_a_make_may_not_populate_in_its_transaction(worker: Worker) -> None:
    def populate(table: Any, key: dict[str, Any], n: int) -> None:
        if n == 2:
            worker.lab.Square.populate(key)

    assert worker.make(populate)[:3] == ["MADE", "FAILED", "NOT_STARTED"]
    assert len(worker.lab.Square()) == 0


def test_a_lost_connection_has_all_made_again(worker: Worker) -> None:
    def lose(table: Any, key: dict[str, Any], n: int) -> None:
        if n == 4 and worker.numbers.count(4) == 1:
            table.connection._conn.close()

    assert worker.make(lose) == ALL_MADE
    assert len(worker.table()) == KEYS
    assert worker.numbers == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert worker.pace.shares


def test_a_lost_connection_that_make_hides_has_all_made(worker: Worker) -> None:
    def lose(table: Any, key: dict[str, Any], n: int) -> None:
        if n == 4 and worker.numbers.count(4) == 1:
            table.connection._conn.close()
            try:
                table.connection.query("SELECT 1")
            except Exception:
                table.connection.query("SELECT 1")

    assert worker.make(lose) == ALL_MADE
    assert len(worker.table()) == KEYS


class Other:
    """A session of somebody else, who changes sessions of the pipeline in a transaction."""

    def __init__(self, lab: ModuleType) -> None:
        self.session = lab.Session()
        self.connection = open_dbapi_connection(settings_of(self.session.connection))
        self.connection.cursor().execute("BEGIN")

    def change(self, n: int) -> None:
        self.connection.cursor().execute(change_of(self.session, n))

    def end(self) -> None:
        self.connection.cursor().execute("ROLLBACK")
        self.connection.close()


def change_of(session: Any, n: int) -> str:
    date = pipelines.FIRST_DATE + datetime.timedelta(days=n - 1)
    return f"UPDATE {session.full_table_name} SET n = n WHERE subject_id = 1 AND session_date = '{date}'"


WAITING = {
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'",
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'",
}


def test_a_deadlock_gives_each_key_its_own_transaction_for_a_while(
    lab: ModuleType, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """Another session has what the third key needs, and needs what the first one has."""
    caplog.set_level("INFO", logger="djdist")
    other, threads = Other(lab), list[threading.Thread]()

    def need_what_the_first_has() -> None:
        with suppress(Exception):  # one of both has to give up
            other.change(1)
        other.end()

    def change_session(table: Any, key: dict[str, Any], n: int) -> None:
        table.connection.query(change_of(other.session, n))
        if n == 2 and not threads:
            threads.append(threading.Thread(target=need_what_the_first_has))
            threads[0].start()
            wait_until(lambda: seen_from_outside(table, WAITING[table.connection.adapter.backend])[0] == (1,))

    # InnoDB gives up whoever has changed fewer rows
    other.change(3)
    other.change(4)
    other.change(5)
    other.change(6)
    assert worker.make(change_session) == ALL_MADE
    threads[0].join()
    assert len(worker.table()) == KEYS
    if worker.numbers != [1, 2, 3, 4, 5, 6]:  # the other one had to give up
        assert worker.numbers == [1, 2, 3, 1, 2, 3, 4, 5, 6]
        assert not worker.pace.shares
        assert "Each key has a transaction of its own for 30 s" in caplog.text


def test_a_lock_that_is_not_got_gives_each_key_its_own_transaction_for_a_while(
    lab: ModuleType, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="djdist")
    other = Other(lab)
    other.change(3)

    def change_session(table: Any, key: dict[str, Any], n: int) -> None:
        table.connection.query(IMPATIENT[table.connection.adapter.backend])
        if worker.numbers == [1, 2, 3, 1]:
            other.end()
        table.connection.query(change_of(other.session, n))

    assert worker.make(change_session) == ALL_MADE
    assert len(worker.table()) == KEYS
    assert worker.numbers == [1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert not worker.pace.shares
    assert "Each key has a transaction of its own for 30 s" in caplog.text


def test_what_is_kept_of_completed_jobs(server: Server, lab: ModuleType, connection: Any) -> None:
    with dj.config.override(jobs__keep_completed=True):
        worker = Worker(lab)
        assert worker.store
        assert worker.make() == ALL_MADE
        assert statuses(worker) == ["success"] * KEYS
        durations = jobs_of(worker.table()).to_arrays("duration")
        assert len({*durations}) == 1
        assert 0 <= durations[0] < 10
        worker.store.close()


@pytest.mark.parametrize("table", ["Square", "Stats", "Renamed", "Reading", "Filtered"])
def test_tables_of_all_kinds(lab: ModuleType, commits: list[str], table: str) -> None:
    worker = Worker(lab, table)
    assert worker.store
    assert {*worker.make()} == {"MADE"}
    assert commits == ["commit"]
    assert len(worker.table()) == len(worker.table().key_source)
    worker.store.close()


def test_hidden_metadata_is_committed_with_the_keys(lab: ModuleType, commits: list[str]) -> None:
    schema = dj.Schema(lab.SCHEMA)
    with dj.config.override(jobs__add_job_metadata=True):

        class WithMetadata(dj.Computed):
            definition = "-> Session"

            def make(self, key: dict[str, Any]) -> None:
                self.insert1(key)

        vars(lab)["WithMetadata"] = schema(WithMetadata, context={"Session": lab.Session})
    worker = Worker(lab, "WithMetadata")
    assert worker.store
    assert worker.make() == ALL_MADE
    assert commits == ["commit"]
    name = worker.table().full_table_name
    counts = lab.Session.connection.query(f"SELECT count(*), count(_job_duration) FROM {name}").fetchone()
    assert counts == (KEYS, KEYS)
    worker.store.close()


def test_keys_that_take_long_are_committed_after_half_a_second(
    worker: Worker, commits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(sharing, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(sharing, "SHARED_SECONDS", 0.5)

    def take(table: Any, key: dict[str, Any], n: int) -> None:
        clock[0] += 0.2

    assert worker.make(take) == ALL_MADE
    assert len(commits) == 3


def test_an_answer_to_the_commit_that_is_lost_is_asked_for(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = MakeSession.commit_shared

    def commit_and_lose(session: MakeSession) -> None:
        connection = session._table.connection
        connection._conn.cursor().execute("COMMIT")
        connection._conn.close()
        commit(session)

    monkeypatch.setattr(MakeSession, "commit_shared", commit_and_lose)
    assert worker.make() == ALL_MADE
    assert worker.numbers == [1, 2, 3, 4, 5, 6]
    assert len(worker.table()) == KEYS


def test_a_commit_that_was_lost_on_the_way_has_all_made_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(session: MakeSession) -> None:
        session.committing = True
        session._table.connection._conn.close()
        session._commit()

    monkeypatch.setattr(MakeSession, "commit_shared", lose)
    assert worker.make() == ALL_MADE
    assert worker.numbers == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]
    assert len(worker.table()) == KEYS


def test_a_commit_that_was_lost_is_not_taken_for_done_where_another_made_its_last_key(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(lab, "Square", reserves=False)
    commit = MakeSession.commit_shared

    def lose(session: MakeSession) -> None:
        monkeypatch.setattr(MakeSession, "commit_shared", commit)
        session.committing, session._shared, table = True, None, session._table
        (row,) = table.to_dicts(order_by="KEY DESC", limit=1)
        table.connection._conn.close()
        names, values = ", ".join(row), ", ".join(f"'{value}'" for value in row.values())
        change_from_outside(table, f"INSERT INTO {table.full_table_name} ({names}) VALUES ({values})")
        raise dj.errors.LostConnectionError("no answer")

    monkeypatch.setattr(MakeSession, "commit_shared", lose)
    assert sorted(worker.make()) == ["ALREADY_MADE", *ALL_MADE[1:]]
    assert len(worker.table()) == KEYS


def be_told_to_end() -> None:
    signal.raise_signal(signal.SIGTERM)


def lose_connection() -> None:
    raise dj.errors.LostConnectionError("lost")


@pytest.mark.parametrize(
    ("happen", "first"), [(be_told_to_end, "INTERRUPTED"), (lose_connection, "TRANSIENT")]
)
@pytest.mark.parametrize(
    ("owner", "name"), [(dj.Connection, "start_transaction"), (make_session, "SharedTransaction")]
)
def test_what_is_raised_as_a_transaction_begins_is_an_outcome_of_its_first_key(
    reserving: Worker,
    monkeypatch: pytest.MonkeyPatch,
    happen: Callable[[], None],
    first: str,
    owner: Any,
    name: str,
) -> None:
    begin = getattr(owner, name)

    def begin_once(*arguments: Any) -> Any:
        monkeypatch.setattr(owner, name, begin)
        happen()

    monkeypatch.setattr(owner, name, begin_once)
    assert reserving.make() == [first] + ["NOT_STARTED"] * (KEYS - 1)
    assert not reserving.table().connection.in_transaction
    assert len(reserving.table()) == 0


def test_a_row_that_others_changed_since_the_transaction_began_can_be_changed(
    lab: ModuleType, worker: Worker
) -> None:
    """MariaDB 11.6.2 and newer refuse that in the transaction that is older."""

    def change_session(table: Any, key: dict[str, Any], n: int) -> None:
        if worker.numbers == [1, 2]:
            change_from_outside(table, change_of(lab.Session(), 4).replace("n = n", "n = n + 100"))
        if n == 4:
            table.connection.query(change_of(lab.Session(), 4))

    assert worker.make(change_session) == ALL_MADE
    assert len(worker.table()) == KEYS
    assert worker.numbers[:2] == [1, 2]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_signal_costs_those_before_nothing(worker: Worker, number: signal.Signals) -> None:
    def interrupt(table: Any, key: dict[str, Any], n: int) -> None:
        if n == 3:
            signal.raise_signal(number)

    assert worker.make(interrupt) == ["NOT_STARTED"] * 2 + ["INTERRUPTED"] + ["NOT_STARTED"] * 3
    assert len(worker.table()) == 0
    assert worker.numbers == [1, 2, 3]
