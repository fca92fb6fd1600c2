"""One suite for every job store, and what the jobs table does beyond it."""

from __future__ import annotations

import datetime
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest
import sqlalchemy as sa

import lab as pipelines
from djdist import populate
from djdist._job import Failure, Job
from djdist._job_store import JobStore
from djdist.database import dbapi, silence
from djdist.database.job_statements import key_values
from djdist.database.marks import worker_mark
from djdist.errors import DatabaseError, LeaseLostError
from djdist.job_stores.jobs_table import transactions
from djdist.job_stores.jobs_table.advisory_lock import LONGEST_WAIT_SECONDS, advisory_lock
from djdist.job_stores.jobs_table.lease import new_token
from djdist.job_stores.jobs_table.missing_keys import MissingKeys
from djdist.job_stores.jobs_table.store import JobsTable, Owner
from djdist.job_stores.jobs_table.transactions import Transactions
from djdist.job_stores.memory import MemoryStore
from djdist.job_stores.pipeline import PipelineStore
from djdist.jobs.table import Jobs, jobs_of, refreshing
from djdist.pipeline.jobs_table import _plain_sql, jobs_table_spec, jobs_table_spec_of
from djdist.pipeline.jobs_table_spec import PARENTS, Following, KeysSpec
from djdist.pipeline.keys import missing_keys
from djdist.pipeline.plan import plan_of
from djdist.shipping.packing import is_alive, settings_of
from djdist.worker import make_session
from djdist.worker.group import WorkerContext
from djdist.worker.session import (
    LastStatement,
    MariaDBSession,
    PlannedSession,
    PostgreSQLSession,
    Session,
    is_mariadb,
)
from lab.relay import Relay, relayed
from lab.watching import meanwhile, wait_until

FAILURE = Failure("ValueError: no", "Traceback of it")
OpenStore = Callable[..., JobsTable]


def keys_of(jobs: list[Job]) -> list[dict[str, Any]]:
    return [job.key for job in jobs]


class JobStoreContract:
    """What every store does; its six jobs differ in urgency."""

    def test_gives_the_most_urgent_first(self, store: JobStore, keys: list[dict[str, Any]]) -> None:
        assert keys_of(store.reserve(2)) == keys[:2]
        assert keys_of(store.reserve(3)) == keys[2:5]

    def test_gives_no_more_than_it_has(self, store: JobStore, keys: list[dict[str, Any]]) -> None:
        assert keys_of(store.reserve(100)) == keys
        assert store.reserve(1) == []

    def test_gives_no_more_than_asked(self, store: JobStore) -> None:
        assert store.reserve(0) == []
        assert len(store.reserve(1)) == 1

    def test_knows_whether_a_job_is_due(self, store: JobStore) -> None:
        assert store.next_priority() is not None
        store.reserve(6)
        assert store.next_priority() is None

    def test_gives_a_tables_own_store(self, store: JobStore, keys: list[dict[str, Any]]) -> None:
        assert keys_of(store.of("Square").reserve(2)) == keys[:2]

    def test_never_gives_a_reserved_job_again(self, store: JobStore, keys: list[dict[str, Any]]) -> None:
        given = [job.identity for _ in range(4) for job in store.reserve(2)]
        assert len(given) == len(set(given)) == len(keys)

    def test_tells_all_that_it_has_reserved(self, store: JobStore) -> None:
        assert store.reserved() == []
        first, *more = store.reserve(3)
        assert {job.identity for job in store.reserved()} == {job.identity for job in (first, *more)}
        store.release(more)
        assert store.reserved() == [first]

    def test_counts_what_may_still_be_reserved(self, store: JobStore) -> None:
        assert (store.pending(), store.pending(most=5), store.pending(most=7)) == (6, 5, 6)
        store.reserve(4)
        assert store.pending() == 2

    def test_gives_released_jobs_again_in_their_order(
        self, store: JobStore, keys: list[dict[str, Any]]
    ) -> None:
        reserved = store.reserve(4)
        assert store.release(reserved[1:3]) == 2
        assert store.pending() == 4
        assert keys_of(store.reserve(3)) == [keys[1], keys[2], keys[4]]

    def test_a_job_released_for_later_is_not_due_before(
        self, store: JobStore, keys: list[dict[str, Any]]
    ) -> None:
        (job,) = store.reserve(1)
        assert store.release([job], delay_seconds=1) == 1
        assert keys_of(store.reserve(6)) == keys[1:]
        wait_until(store.pending, "the delay to end")
        assert store.reserve(6) == [job]

    def test_tells_only_of_begun_jobs_that_they_have_begun(self, store: JobStore) -> None:
        (job,) = store.reserve(1)
        assert store.begun([job]) == []
        store.release([job])
        assert store.begun([job]) == []
        assert store.begun([]) == []

    def test_releases_nothing_when_there_is_nothing(self, store: JobStore) -> None:
        assert store.release([]) == 0
        assert store.pending() == 6

    def test_does_not_give_a_failed_job_again(self, store: JobStore, keys: list[dict[str, Any]]) -> None:
        (job,) = store.reserve(1)
        store.fail(job, FAILURE, "a host", 7)
        assert store.release([job]) == 0
        assert store.renew([job]) == []
        assert store.pending() == 5
        assert keys_of(store.reserve(6)) == keys[1:]

    def test_leaves_a_job_alone_that_it_has_not_reserved(
        self, store: JobStore, keys: list[dict[str, Any]]
    ) -> None:
        for key in keys:
            store.fail(Job("Square", key), FAILURE)
            store.forget(Job("Square", key))
            store.release([Job("Square", key)])
        assert keys_of(store.reserve(6)) == keys

    def test_leaves_a_job_alone_that_it_has_given_back(
        self, store: JobStore, keys: list[dict[str, Any]]
    ) -> None:
        (job,) = store.reserve(1)
        store.release([job])
        store.fail(job, FAILURE)
        store.release([job])
        assert keys_of(store.reserve(6)) == keys

    def test_renews_and_rescues_without_taking_live_jobs(self, store: JobStore) -> None:
        reserved = store.reserve(2)
        assert store.renew(reserved) == reserved
        assert store.renew([]) == []
        assert store.rescue() == 0
        assert store.pending() == 4

    def test_can_be_pickled_before_and_after_use(self, store: JobStore, keys: list[dict[str, Any]]) -> None:
        assert keys_of(pickle.loads(pickle.dumps(store)).reserve(2)) == keys[:2]
        assert store.pending() in (4, 6)
        other = pickle.loads(pickle.dumps(store))
        other.pending()
        other.close()

    def test_a_worker_needs_nothing_of_the_store_to_unpickle_jobs(self, store: JobStore) -> None:
        assert b"sqlalchemy" not in pickle.dumps(store.reserve(6))

    def test_can_be_closed_twice_and_used_again(self, store: JobStore) -> None:
        store.close()
        store.close()
        assert store.pending() == 6


class TestMemoryStore(JobStoreContract):
    @pytest.fixture
    def keys(self) -> list[dict[str, Any]]:
        return [{"subject_id": n % 2, "n": n} for n in range(6)]

    @pytest.fixture
    def store(self, keys: list[dict[str, Any]]) -> MemoryStore:
        return MemoryStore("Square", keys)

    def test_keeps_reserved_jobs_that_may_have_begun(self, store: MemoryStore) -> None:
        assert store.release_waiting(store.reserve(2)) == []
        assert store.pending() == 4


class TestPipelineStore(JobStoreContract):
    """Two tables, of which the second one is below the first."""

    @pytest.fixture
    def keys(self) -> list[dict[str, Any]]:
        return [{"subject_id": n % 2, "n": n} for n in range(6)]

    @pytest.fixture
    def store(self, keys: list[dict[str, Any]]) -> PipelineStore:
        return PipelineStore(
            {"Root": MemoryStore("Root", keys[3:]), "Square": MemoryStore("Square", keys[:3])}
        )

    def test_gives_the_deepest_table_first_and_others_while_room_lasts(self, store: PipelineStore) -> None:
        assert [job.table for job in store.reserve(5)] == ["Square"] * 3 + ["Root"] * 2
        assert (store.pending(), store.of("Root").pending()) == (1, 1)

    def test_the_same_key_of_another_table_is_another_job(self) -> None:
        store = PipelineStore({name: MemoryStore(name, [{"n": 1}]) for name in ("Root", "Square")})
        square, root = store.reserve(2)
        assert store.release([root]) == 1
        assert store.renew([root, square]) == store.reserved() == [square]


def keeping(store: JobsTable) -> JobsTable:
    """Give a run's store as it is where completed jobs are kept."""
    return replace(store, spec=replace(store.spec, keep_completed=True))


@pytest.fixture
def open_store() -> Iterator[OpenStore]:
    """Opens stores of a table, each with a token of its own; closes them at the end."""
    stores: list[JobsTable] = []

    def open_store(
        table: Any,
        *restrictions: Any,
        lease_seconds: int = 60,
        max_priority: int | None = None,
        refreshes: bool = True,
        **options: Any,
    ) -> JobsTable:
        jobs = jobs_of(table())
        spec = jobs_table_spec(jobs, restrictions)
        owner = Owner(new_token(lease_seconds), "me", "v1")
        store = JobsTable(spec, owner, max_priority, refreshing(jobs, **options) if refreshes else None)
        stores.append(store)
        return store

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def jobs(lab: ModuleType) -> Jobs:
    """The empty jobs table of `lab.Square` over six sessions."""
    pipelines.fill(lab)
    return jobs_of(lab.Square())


@pytest.fixture
def keys(lab: ModuleType, jobs: Jobs, open_store: OpenStore) -> list[dict[str, Any]]:
    """Six pending jobs of priorities 1 to 6, in this order, which isn't that of the key."""
    open_store(lab.Square).refresh()
    keys: list[dict[str, Any]] = jobs.keys(order_by="session_date DESC, subject_id")
    for priority, key in enumerate(keys, 1):
        jobs.update1({**key, "priority": priority})
    return keys


@pytest.fixture
def store(lab: ModuleType, keys: list[dict[str, Any]], open_store: OpenStore) -> JobsTable:
    return open_store(lab.Square)


@pytest.fixture
def other(lab: ModuleType, open_store: OpenStore) -> JobsTable:
    """Another run on the same jobs."""
    return open_store(lab.Square)


@pytest.fixture
def native(lab: ModuleType, jobs: Jobs) -> dj.Job:
    """The jobs as a worker without djdist sees them."""
    return dj.Job(lab.Square())


def add_sessions(lab: ModuleType, count: int) -> None:
    first = datetime.date(1900, 1, 1)
    lab.Session.insert(
        {"subject_id": 1, "session_date": first + datetime.timedelta(days=n), "n": n} for n in range(count)
    )


def rows(jobs: dj.Job) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = jobs.to_dicts(order_by="KEY")
    return found


def row(jobs: dj.Job, key: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = (jobs & key).fetch1()
    return found


def age(jobs: dj.Job, column: str, seconds: int, where: str = "1=1") -> None:
    """Make a moment in the jobs table so much older, or younger."""
    sign = "-" if seconds >= 0 else "+"
    interval = f"INTERVAL '{abs(seconds)}' SECOND"
    jobs.connection.query(
        f"UPDATE {jobs.full_table_name} SET {column} = {column} {sign} {interval} WHERE {where}"
    )


def statuses(jobs: dj.Job) -> dict[str, int]:
    return {status: count for status, count in jobs.progress().items() if count and status != "total"}


def worker_values(store: JobsTable, job: Job) -> dict[str, Any]:
    key = key_values(job.key, store.spec.settings.backend)
    return {"worker_host": "a worker", "worker_pid": 77, "seconds": 1.5, **key}


def open_session(kind: type[Session], connection: Any) -> Session:
    if kind is MariaDBSession and not is_mariadb(connection._conn):
        pytest.skip("this is MySQL")
    return kind(connection._conn, connection.adapter.translate_error)


@contextmanager
def counting_statements() -> Iterator[list[str]]:
    statements: list[str] = []

    def count(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        statements.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", count)
    try:
        yield statements
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", count)


def at_once(count: int, act: Callable[[int], Any]) -> list[Any]:
    """Do it in so many threads that begin together."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Any:
        barrier.wait()
        return act(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


class TestJobsTable(JobStoreContract):
    """The contract, on each database."""


def added_at_last(store: JobsTable, parents: list[Job]) -> int:
    """Add what comes of some jobs upstream as soon as nobody else adds any."""
    while (added := store.add_new(parents)) is None:
        pass
    return added


class TestConnections:
    """Two of them suffice, whatever is under way."""

    def test_one_is_left_while_whole_tables_are_read(self, lab: ModuleType, open_store: OpenStore) -> None:
        pipelines.fill(lab)
        store = open_store(lab.Square)
        store.refresh()
        mine = store.reserve(1)
        slow, reads = threading.Event(), list[str]()

        def read_slowly(_c: Any, _u: Any, statement: str, _p: Any, _x: Any, _m: bool) -> None:
            if statement.rpartition("; ")[2].startswith(("INSERT", "SELECT count(*)")):  # after settings
                reads.append(statement)
                assert slow.wait(60)

        engine = store._shared.engine()  # none but its own, which nothing else listens to
        sa.event.listen(engine, "before_cursor_execute", read_slowly)
        with ThreadPoolExecutor(4) as pool:
            try:
                whole: list[Future[Any]] = [pool.submit(store.refresh), pool.submit(store.pending)]
                wait_until(lambda: reads, "one to be under way")
                wait(whole, timeout=0.5)
                quick = [pool.submit(store.reserve, 2), pool.submit(store.renew, mine)]
                assert not wait(quick, timeout=30).not_done
            finally:
                slow.set()
        assert [len(part.result()) for part in quick] == [2, 1]
        assert whole[1].result() == 3


class TestHeldByOthers:
    def test_living_runs_hold_what_they_reserve(self, store: JobsTable, other: JobsTable, jobs: Jobs) -> None:
        assert store.held_by_others() == 0
        store.reserve(1)
        other.reserve(3)
        assert (store.held_by_others(), other.held_by_others()) == (3, 1)
        age(jobs, "reserved_time", 61)
        assert (store.held_by_others(), other.held_by_others()) == (0, 0)

    def test_native_workers_hold_it_while_their_session_lasts(
        self, lab: ModuleType, store: JobsTable, server: Any, keys: list[dict[str, Any]]
    ) -> None:
        with server.connect() as elsewhere:
            worker = dj.Job(lab.Square())
            worker._connection = elsewhere
            assert worker.reserve(keys[0])
            assert store.held_by_others() == 1
            age(worker, "reserved_time", 10**8)
            assert store.held_by_others() == 0  # another session has got the number since
            age(worker, "reserved_time", -(10**8))
            assert store.held_by_others() == 1
        wait_until(lambda: not store.held_by_others(), "the server to end the session")

    def test_what_restrictions_leave_out_is_no_concern(
        self, lab: ModuleType, open_store: OpenStore, other: JobsTable, keys: list[dict[str, Any]]
    ) -> None:
        other.reserve(6)
        assert open_store(lab.Square, {"subject_id": 1}).held_by_others() == 3


class TestReserving:
    def test_records_whose_the_reservation_is(self, store: JobsTable, jobs: Jobs) -> None:
        (job,) = store.reserve(1)
        reserved = row(jobs, job.key)
        assert (reserved["status"], reserved["connection_id"]) == ("reserved", store.owner.token)
        assert (reserved["user"], reserved["version"], reserved["pid"]) == ("me", "v1", 0)
        assert reserved["reserved_time"] is not None
        assert reserved["host"]

    def test_two_runs_share_the_jobs(self, store: JobsTable, other: JobsTable) -> None:
        mine, theirs = store.reserve(2), other.reserve(10)
        assert len(theirs) == 4
        assert not {job.identity for job in mine} & {job.identity for job in theirs}

    def test_native_workers_and_runs_share_the_jobs(
        self, store: JobsTable, native: dj.Job, keys: list[dict[str, Any]]
    ) -> None:
        assert native.reserve(keys[0])
        assert keys_of(store.reserve(2)) == keys[1:3]
        assert not native.reserve(keys[1])

    def test_smaller_priorities_come_first_also_below_zero(
        self, store: JobsTable, jobs: Jobs, keys: list[dict[str, Any]]
    ) -> None:
        jobs.update1({**keys[5], "priority": -128})
        jobs.update1({**keys[4], "priority": -1})
        assert keys_of(store.reserve(3)) == [keys[5], keys[4], keys[0]]

    def test_among_equals_those_scheduled_earlier_come_first(
        self, store: JobsTable, jobs: Jobs, keys: list[dict[str, Any]]
    ) -> None:
        for position, key in enumerate(reversed(keys)):
            jobs.update1({**key, "priority": 5})
            where = f"session_date = '{key['session_date']}' AND subject_id = {key['subject_id']}"
            age(jobs, "scheduled_time", 100 - position, where)
        assert keys_of(store.reserve(6)) == list(reversed(keys))

    def test_jobs_scheduled_for_later_wait(
        self, store: JobsTable, jobs: Jobs, keys: list[dict[str, Any]]
    ) -> None:
        age(jobs, "scheduled_time", -1000, "priority <= 4")
        assert store.pending() == 2
        assert keys_of(store.reserve(10)) == keys[4:]

    def test_a_highest_priority_leaves_the_less_urgent(
        self, lab: ModuleType, open_store: OpenStore, keys: list[dict[str, Any]]
    ) -> None:
        store = open_store(lab.Square, max_priority=2)
        assert store.pending() == 2
        assert keys_of(store.reserve(10)) == keys[:2]

    def test_only_the_more_urgent_are_given_where_others_may_be_more_urgent_than_the_rest(
        self, lab: ModuleType, open_store: OpenStore, store: JobsTable, keys: list[dict[str, Any]]
    ) -> None:
        assert store.next_priority() == 1
        assert keys_of(store.reserve(10, max_priority=2)) == keys[:2]
        assert store.reserve(10, max_priority=2) == []
        assert store.next_priority() == 3
        least_urgent = open_store(lab.Square, max_priority=3)
        assert keys_of(least_urgent.reserve(10, max_priority=5)) == keys[2:3]
        assert (least_urgent.next_priority(), store.next_priority()) == (None, 4)

    @pytest.mark.parametrize("status", ["success", "error", "ignore", "reserved"])
    def test_only_pending_jobs_are_given(
        self, store: JobsTable, jobs: Jobs, keys: list[dict[str, Any]], status: str
    ) -> None:
        jobs.update1({**keys[0], "status": status})
        assert store.pending() == 5
        assert keys_of(store.reserve(10)) == keys[1:]

    def test_many_at_once_get_each_job_once_and_lose_none(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs
    ) -> None:
        add_sessions(lab, 68)
        stores = [open_store(lab.Square) for _ in range(4)]
        stores[0].refresh()

        def reserve_all(number: int) -> list[Job]:
            reserved: list[Job] = []
            while found := stores[number].reserve(3):
                reserved += found
            return reserved

        given = [job.identity for part in at_once(4, reserve_all) for job in part]
        assert len(given) == len(set(given))
        assert len(given) + stores[0].pending() == 74
        assert stores[0].pending() == 0
        assert statuses(jobs) == {"reserved": 74}

    def test_many_at_once_reserve_and_release_without_a_loss(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs, keys: list[dict[str, Any]]
    ) -> None:
        stores = [open_store(lab.Square) for _ in range(4)]

        def reserve_and_release(number: int) -> None:
            for _ in range(10):
                reserved = stores[number].reserve(2)
                stores[number].renew(reserved)
                stores[number].rescue()
                stores[number].release(reserved)

        at_once(4, reserve_and_release)
        assert statuses(jobs) == {"pending": 6}

    def test_a_lost_connection_is_replaced(
        self, store: JobsTable, connection: Any, server: Any, keys: list[dict[str, Any]]
    ) -> None:
        assert store.pending() == 6
        end_other_sessions(connection)
        assert keys_of(store.reserve(2)) == keys[:2]

    @pytest.mark.long_on("mysql")
    def test_a_database_that_is_away_is_waited_for_while_that_is_wanted(
        self, store: JobsTable, server: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        with relayed(server.host, server.port) as relay:
            login = {**(store.spec.settings.login or {}), "port": relay.port}
            spec = replace(store.spec, settings=replace(store.spec.settings, login=login))
            far = JobsTable(spec, store.owner, patience_seconds=3600)
            assert far.pending() == 6
            relay.go_out()

            def come_back() -> None:
                wait_until(lambda: relay.refused and "Waiting for the database" in caplog.text)
                relay.come_back()

            with meanwhile(come_back):
                assert far.pending() == 6
            told = [message for message in caplog.messages if "database" in message]
            assert ["Waiting for" in message for message in told] == [True, False]
            asked: list[int] = []

            def is_wanted() -> bool:
                asked.append(relay.refused)
                return len(asked) < 3

            far.wait_while(is_wanted)
            relay.go_out()
            with pytest.raises(DatabaseError, match="can't be reached"):
                far.pending()
            assert len(asked) == 3
            relay.come_back()
            assert far.pending() == 6
            far.close()

    def test_ends_the_session_of_a_dead_worker(self, store: JobsTable, server: Any, connection: Any) -> None:
        with begun_by_a_worker(store, server, connection, 1) as (jobs, worker):
            store.end_sessions(jobs)
            assert not is_alive_soon(worker)

    def test_ends_no_session_of_a_worker_that_has_begun_another_job(
        self, store: JobsTable, server: Any, connection: Any
    ) -> None:
        with begun_by_a_worker(store, server, connection, 2) as (jobs, worker):
            store.end_sessions(jobs[:1])
            assert is_alive_soon(worker)

    def test_ends_the_sessions_of_a_run_that_is_rescued(
        self, store: JobsTable, server: Any, connection: Any, jobs: Jobs
    ) -> None:
        with begun_by_a_worker(store, server, connection, 2) as (_, worker):
            age(jobs, "reserved_time", 1000, "status = 'reserved'")
            assert store.rescue() == 2
            assert not is_alive_soon(worker)

    @pytest.fixture
    def doubting_soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(silence, "DOUBT_SECONDS", 0.5)
        monkeypatch.setattr(silence, "ASK_SECONDS", 0.2)
        monkeypatch.setattr(silence, "CERTAIN_SECONDS", 1)
        monkeypatch.setattr(dbapi, "TIMEOUT_SECONDS", 2)

    @pytest.fixture
    def far(self, store: JobsTable, server: Any) -> Iterator[tuple[JobsTable, Relay]]:
        """The same jobs over a relay, with a connection that is open."""
        with relayed(server.host, server.port) as relay:
            login = {**(store.spec.settings.login or {}), "port": relay.port}
            spec = replace(store.spec, settings=replace(store.spec.settings, login=login))
            with closing(JobsTable(spec, store.owner, patience_seconds=3600)) as far:
                assert far.pending() == 6
                yield far, relay
                relay.speak_again()

    def test_a_connection_that_a_relay_has_forgotten_is_replaced(
        self, far: tuple[JobsTable, Relay], doubting_soon: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        store, relay = far
        relay.forget()
        assert store.pending() == 6
        assert "fell silent" in caplog.text

    def test_a_server_that_falls_silent_is_waited_for_no_longer_than_that_is_wanted(
        self, far: tuple[JobsTable, Relay], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, relay = far
        monkeypatch.setattr(transactions, "LAST_SECONDS", 0.5)
        relay.fall_silent()
        store.wait_while(lambda: False)
        with pytest.raises(DatabaseError, match=r"no answer|can't be reached"):
            store.pending()

    @pytest.mark.long_on("postgresql")
    def test_a_statement_that_takes_long_is_not_cut(
        self, store: JobsTable, far: tuple[JobsTable, Relay], doubting_soon: None, server: Any, jobs: Any
    ) -> None:
        reserved, slow = store.reserve(1), far[0]
        with server.connect() as other, ThreadPoolExecutor() as thread:
            other.start_transaction()
            other.query(f"SELECT status FROM {jobs.full_table_name} FOR UPDATE")
            released = thread.submit(slow.release, reserved)
            assert not wait([released], dbapi.TIMEOUT_SECONDS + 0.5).done
            other.cancel_transaction()
            assert released.result() == 1

    def test_a_silent_server_keeps_no_signal_from_ending_the_wait(
        self, far: tuple[JobsTable, Relay], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, relay = far
        monkeypatch.setattr(transactions, "LAST_SECONDS", 0.5)
        relay.fall_silent()
        timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            store.pending()


@contextmanager
def begun_by_a_worker(
    store: JobsTable, server: Any, connection: Any, count: int
) -> Iterator[tuple[list[Job], Any]]:
    """Give jobs that a worker has begun, and its session."""
    jobs = store.reserve(count)
    store.job_statements().begins(connection, [worker_values(store, job) for job in jobs])
    worker = server.connect()
    silence.bear(worker._conn, worker_mark(store.owner.token, "a worker", 77))
    yield jobs, worker
    worker.close()


def is_alive_soon(worker: Any) -> bool:
    """Tell whether a session is there, also when the server has had time to end it."""
    time.sleep(0.5)
    return is_alive(worker)


def end_other_sessions(connection: Any) -> None:
    """Let the server end all sessions of this user but the connection's own."""
    if connection.adapter.backend == "postgresql":
        connection.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE usename = current_user AND pid <> pg_backend_pid()"
        )
        return
    sessions = connection.query(
        "SELECT id FROM information_schema.processlist "
        "WHERE user = SUBSTRING_INDEX(CURRENT_USER(), '@', 1) AND id <> CONNECTION_ID()"
    ).fetchall()
    for (session,) in sessions:
        connection.query(f"KILL {session}")


class TestGivingBack:
    def test_it_is_known_what_one_process_has_begun(
        self, store: JobsTable, other: JobsTable, connection: Any
    ) -> None:
        for each in (other, store):
            begun, _ = each.reserve(2)
            each.job_statements().begins(connection, [worker_values(each, begun)])
        assert store.begun_by("a worker", 77) == [begun]
        assert store.begun_by("a worker", 78) == store.begun_by("another", 77) == []

    def test_a_released_job_is_as_it_was(self, store: JobsTable, jobs: Jobs) -> None:
        before = rows(jobs)
        store.release(store.reserve(6))
        assert rows(jobs) == before

    def test_begun_jobs_are_spared_where_only_waiting_ones_are_released(
        self, store: JobsTable, jobs: Jobs, connection: Any
    ) -> None:
        begun, waiting = store.reserve(2)
        assert store.job_statements().begins(connection, [worker_values(store, begun)]) == [True]
        assert store.release_waiting([begun, waiting]) == [waiting]
        assert row(jobs, begun.key)["status"] == "reserved"
        assert row(jobs, waiting.key)["status"] == "pending"

    def test_a_job_whose_beginning_was_undone_is_waiting_again(
        self, store: JobsTable, jobs: Jobs, connection: Any
    ) -> None:
        (job,) = store.reserve(1)
        statements, values = store.job_statements(), worker_values(store, job)
        before = row(jobs, job.key)
        assert statements.begins(connection, [values]) == [True]
        statements.hand_back_begun(connection, [{**values, "worker_pid": -1}])
        assert store.begun([job]) == [job]
        statements.hand_back_begun(connection, [values])
        assert store.begun([job]) == []
        assert {**row(jobs, job.key), "host": before["host"]} == before
        assert store.handed_back([job])
        assert not store.handed_back(store.reserve(1))
        assert store.release_waiting([job]) == [job]

    def test_another_runs_jobs_are_not_changed(self, store: JobsTable, other: JobsTable, jobs: Jobs) -> None:
        theirs = other.reserve(6)
        before = rows(jobs)
        store.release(theirs)
        assert store.release_waiting(theirs) == []
        store.fail(theirs[0], FAILURE)
        store.renew(theirs)
        assert rows(jobs) == before

    def test_native_reservations_are_not_changed(
        self, store: JobsTable, native: dj.Job, keys: list[dict[str, Any]]
    ) -> None:
        native.reserve(keys[0])
        before = rows(native)
        store.release([Job("Square", keys[0])])
        store.fail(Job("Square", keys[0]), FAILURE)
        store.renew([Job("Square", keys[0])])
        assert rows(native) == before


class TestNotes:
    @pytest.mark.parametrize("keep_completed", [False, True])
    def test_they_are_kept_with_what_the_run_has_reserved_or_made(
        self, store: JobsTable, other: JobsTable, jobs: Jobs, connection: Any, keep_completed: bool
    ) -> None:
        store = keeping(store) if keep_completed else store
        assert store.keeps_made is keep_completed
        given_back, made = store.reserve(2)
        (theirs,) = other.reserve(1)
        statements, values = store.job_statements(), worker_values(store, made)
        assert statements.begins(connection, [values]) == [True]
        statements.finish_or_undo(connection, {**values, "seconds": 0.5})
        PipelineStore({"Square": store}).note([given_back, made, theirs], "needs more")
        store.release([given_back])
        assert [job["error_message"] for job in rows(jobs)].count("needs more") == 1 + keep_completed
        assert row(jobs, given_back.key)["status"] == "pending"
        assert row(jobs, given_back.key)["error_message"] == "needs more"
        assert row(jobs, theirs.key)["error_message"] == ""

    def test_native_workers_take_no_notice(
        self, store: JobsTable, native: dj.Job, keys: list[dict[str, Any]]
    ) -> None:
        jobs = store.reserve(2)
        store.note(jobs, "needs more")
        store.release(jobs)
        assert len(native.errors) == 0
        native.refresh()
        assert native.reserve(keys[0])
        assert native.reserve(keys[1])
        native.error(keys[0], "bad")
        native.complete(keys[1])
        assert [job["error_message"] for job in rows(native) if job["status"] == "error"] == ["bad"]


class TestFailing:
    def test_an_error_is_recorded_as_datajoint_does(
        self, store: JobsTable, native: dj.Job, keys: list[dict[str, Any]]
    ) -> None:
        (job,) = store.reserve(1)
        store.fail(job, FAILURE, "a worker", 77)
        native.reserve(keys[1])
        native.error(keys[1], FAILURE.message, FAILURE.traceback)
        ours, theirs = row(native, keys[0]), row(native, keys[1])
        same = ("status", "error_message", "error_stack")
        assert [ours[name] for name in same] == [theirs[name] for name in same]
        assert (ours["host"], ours["pid"]) == ("a worker", 77)
        assert ours["completed_time"] is not None

    @pytest.mark.parametrize("length", [2046, 2047, 2048, 10_000])
    def test_long_messages_are_shortened_as_datajoint_does(
        self, store: JobsTable, native: dj.Job, keys: list[dict[str, Any]], length: int
    ) -> None:
        message = "x" * length
        (job,) = store.reserve(1)
        store.fail(job, Failure(message))
        native.error(keys[1], message)
        ours = row(native, keys[0])["error_message"]
        assert ours == row(native, keys[1])["error_message"]
        assert len(ours) == min(length, 2047)
        assert ours.endswith("...truncated") == (length > 2047)

    @pytest.mark.parametrize(
        "text",
        [
            "a \x00 NUL",
            "a lone \ud800 surrogate",
            "🧠 in the brain",
            "100% of 'it' :x \\ \"q\"",
            "\ud800" * 2047,
        ],
        ids=["NUL", "surrogate", "emoji", "quotes", "many"],
    )
    def test_any_text_can_be_recorded(self, store: JobsTable, jobs: Jobs, text: str) -> None:
        (job,) = store.reserve(1)
        store.fail(job, Failure(text, f"Traceback: {text}"))
        recorded = row(jobs, job.key)
        assert recorded["status"] == "error"
        if text.isprintable():
            escaped = text.encode("ascii", "backslashreplace").decode()  # where the column is in latin1
            assert recorded["error_message"] in (text, escaped)
            assert recorded["error_stack"] == f"Traceback: {text}"
        else:
            assert recorded["error_message"]
            assert recorded["error_stack"].startswith("Traceback: ")


class TestLease:
    def test_a_dead_runs_jobs_are_rescued_with_their_priority(
        self,
        lab: ModuleType,
        store: JobsTable,
        open_store: OpenStore,
        jobs: Jobs,
        keys: list[dict[str, Any]],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        before = rows(jobs)
        dead = open_store(lab.Square, lease_seconds=1)
        dead.reserve(3)
        age(jobs, "reserved_time", 10, f"connection_id = {dead.owner.token}")
        assert store.rescue() == 3
        assert f"Rescued 3 jobs of {lab.SCHEMA}.Square from a run that died" in caplog.messages
        assert rows(jobs) == before
        assert keys_of(store.reserve(6)) == keys

    @pytest.mark.parametrize("keep_completed", [False, True])
    @pytest.mark.parametrize("refreshes", [False, True])
    def test_a_dead_runs_job_whose_result_is_there_is_finished(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs, keep_completed: bool, refreshes: bool
    ) -> None:
        dead = open_store(lab.Square, lease_seconds=1)
        dead.refresh()
        made, left = dead.reserve(2)
        lab.Square.insert1({**made.key, "result": 1}, allow_direct_insert=True)
        age(jobs, "reserved_time", 10, f"connection_id = {dead.owner.token}")
        with dj.config.override(jobs__keep_completed=keep_completed):
            store = open_store(lab.Square, refreshes=refreshes)
        assert store.rescue() == 1
        assert row(jobs, left.key)["status"] == "pending"
        finished = (jobs & made.key).to_dicts()
        assert [job["status"] for job in finished] == ["success"] * keep_completed

    def test_what_was_renewed_in_time_is_spared(
        self, lab: ModuleType, store: JobsTable, open_store: OpenStore, jobs: Jobs
    ) -> None:
        alive = open_store(lab.Square, lease_seconds=20)
        reserved = alive.reserve(3)
        age(jobs, "reserved_time", 10, f"connection_id = {alive.owner.token}")
        assert store.rescue() == 0
        age(jobs, "reserved_time", 1000, f"connection_id = {alive.owner.token}")
        alive.renew(reserved)
        assert store.rescue() == 0
        assert statuses(jobs) == {"pending": 3, "reserved": 3}

    def test_a_worker_that_is_frozen_before_its_commit_keeps_its_own_job_only(
        self, lab: ModuleType, store: JobsTable, open_store: OpenStore, server: Any, jobs: Jobs
    ) -> None:
        dead = open_store(lab.Square, lease_seconds=1)
        frozen, _ = dead.reserve(2)
        age(jobs, "reserved_time", 10, f"connection_id = {dead.owner.token}")
        connection = server.connect()
        connection.start_transaction()
        statements = dead.job_statements()
        assert statements.begins(connection, [worker_values(dead, frozen)]) == [True]
        assert store.rescue() == 1
        connection.close()
        wait_until(lambda: store.rescue() == 1, "the server to end the transaction")

    def test_each_reservation_lives_as_long_as_its_own_lease(
        self, lab: ModuleType, store: JobsTable, open_store: OpenStore, jobs: Jobs
    ) -> None:
        short, long = open_store(lab.Square, lease_seconds=1), open_store(lab.Square, lease_seconds=65_535)
        short.reserve(1)
        spared = long.reserve(1)
        age(jobs, "reserved_time", 60_000, "status = 'reserved'")
        assert store.rescue() == 1
        assert jobs.reserved.keys() == keys_of(spared)

    def test_native_reservations_are_never_rescued(
        self, store: JobsTable, native: dj.Job, keys: list[dict[str, Any]]
    ) -> None:
        native.reserve(keys[0])
        age(native, "reserved_time", 1_000_000, "status = 'reserved'")
        assert store.rescue() == 0
        assert native.reserved.keys() == [keys[0]]

    def test_renewing_moves_the_moment_of_the_given_reservations(self, store: JobsTable, jobs: Jobs) -> None:
        *renewed, left = store.reserve(3)
        age(jobs, "reserved_time", 30, "status = 'reserved'")
        before = {job.identity: row(jobs, job.key)["reserved_time"] for job in [*renewed, left]}
        store.renew(renewed)
        assert all(row(jobs, job.key)["reserved_time"] > before[job.identity] for job in renewed)
        assert row(jobs, left.key)["reserved_time"] == before[left.identity]

    def test_renewing_tells_which_are_still_the_runs(self, store: JobsTable) -> None:
        mine, given_back = store.reserve(2)
        store.release([given_back])
        assert store.renew([given_back, mine]) == [mine]

    def test_many_reservations_are_renewed(self, lab: ModuleType, open_store: OpenStore, jobs: Jobs) -> None:
        add_sessions(lab, 2000)
        store = open_store(lab.Square)
        store.refresh()
        reserved = store.reserve(3000)
        age(jobs, "reserved_time", 1000)
        store.renew(reserved)
        assert store.rescue() == 0
        store.release(reserved)
        assert statuses(jobs) == {"pending": 2006}

    def test_native_orphan_cleaning_spares_renewed_jobs(
        self, store: JobsTable, jobs: Jobs, native: dj.Job
    ) -> None:
        reserved = store.reserve(2)
        age(jobs, "reserved_time", 1000, "status = 'reserved'")
        store.renew(reserved)
        assert native.refresh(orphan_timeout=100)["orphaned"] == 0

    def test_a_refresh_rescues_too(
        self, lab: ModuleType, store: JobsTable, open_store: OpenStore, jobs: Jobs
    ) -> None:
        open_store(lab.Square, lease_seconds=1).reserve(2)
        age(jobs, "reserved_time", 10, "status = 'reserved'")
        assert store.refresh()["orphaned"] == 2
        assert statuses(jobs) == {"pending": 6}


def endings_of_a_group(store: JobsTable, table: Any) -> list[str]:
    """Let a worker make three keys as one group, and tell how each ended."""
    store.refresh()
    context = WorkerContext(table, {}, store.spec.settings, "", store.job_statements(), own_connection=True)
    report = context(store.reserve(3))
    table.connection.connect()
    return [outcome.ending.name for outcome in report.outcomes]


class TestFence:
    def test_a_worker_notes_where_it_works(self, store: JobsTable, jobs: Jobs, connection: Any) -> None:
        (job,) = store.reserve(1)
        assert store.job_statements().begins(connection, [worker_values(store, job)]) == [True]
        assert store.begun([job]) == [job]
        begun = row(jobs, job.key)
        assert (begun["host"], begun["pid"], begun["status"]) == ("a worker", 77, "reserved")

    def test_a_job_begins_once(self, store: JobsTable, connection: Any) -> None:
        """A cluster may run a task again whose first worker it takes for dead."""
        (job,) = store.reserve(1)
        statements, values = store.job_statements(), worker_values(store, job)
        assert statements.begins(connection, [values]) == [True]
        assert statements.begins(connection, [{**values, "worker_pid": 78}]) == [False]
        with pytest.raises(LeaseLostError):
            statements.finish_or_undo(connection, {**values, "worker_pid": 78})
        statements.finish_or_undo(connection, values)

    def test_a_worker_sees_whether_one_of_its_jobs_is_made_already(
        self, store: JobsTable, connection: Any, lab: ModuleType
    ) -> None:
        jobs = store.reserve(3)
        statements, values = store.job_statements(), [worker_values(store, job) for job in jobs]
        assert statements.begins(connection, values) == [True] * 3
        assert not statements.any_made(connection, values)
        lab.Square.insert1({**jobs[1].key, "result": 1}, allow_direct_insert=True)
        assert statements.any_made(connection, values)

    def test_a_released_job_is_not_finished_by_who_had_begun_it(
        self, store: JobsTable, connection: Any
    ) -> None:
        (job,) = store.reserve(1)
        statements, values = store.job_statements(), worker_values(store, job)
        assert statements.begins(connection, [values]) == [True]
        store.release([job])
        assert store.reserve(1) == [job]
        with pytest.raises(LeaseLostError):
            statements.finish_or_undo(connection, values)

    def test_finishing_removes_the_job(self, store: JobsTable, jobs: Jobs, connection: Any) -> None:
        (job,) = store.reserve(1)
        statements, values = store.job_statements(), worker_values(store, job)
        assert statements.begins(connection, [values]) == [True]
        statements.finish_or_undo(connection, values)
        assert not jobs & job.key
        assert len(jobs) == 5

    def test_finishing_keeps_the_job_as_a_success(
        self, store: JobsTable, jobs: Jobs, connection: Any
    ) -> None:
        (job,) = store.reserve(1)
        statements, values = keeping(store).job_statements(), worker_values(store, job)
        assert statements.begins(connection, [values]) == [True]
        statements.finish_or_undo(connection, values)
        finished = row(jobs, job.key)
        assert (finished["status"], finished["duration"]) == ("success", 1.5)
        assert finished["completed_time"] is not None
        assert statuses(jobs) == {"pending": 5, "success": 1}

    @pytest.mark.parametrize("keep_completed", [False, True])
    def test_another_runs_job_is_not_changed(
        self, store: JobsTable, other: JobsTable, jobs: Jobs, connection: Any, keep_completed: bool
    ) -> None:
        (job,) = other.reserve(1)
        before = rows(jobs)
        statements = (keeping(store) if keep_completed else store).job_statements()
        assert statements.begins(connection, [worker_values(store, job)]) == [False]
        with pytest.raises(LeaseLostError):
            statements.finish_or_undo(connection, worker_values(store, job))
        assert rows(jobs) == before

    @pytest.mark.parametrize(
        ("server", "kind"),
        [
            ("mysql", Session),
            ("mysql", MariaDBSession),
            ("postgresql", PostgreSQLSession),
            ("postgresql", PlannedSession),
        ],
        indirect=["server"],
    )
    @pytest.mark.parametrize("keep_completed", [False, True])
    @pytest.mark.parametrize("nth_is_lost", [0, 1])
    def test_results_are_committed_with_their_jobs_or_not_at_all(
        self,
        lab: ModuleType,
        store: JobsTable,
        jobs: Jobs,
        connection: Any,
        kind: Any,
        keep_completed: bool,
        nth_is_lost: int,
    ) -> None:
        statements, mine = (keeping(store) if keep_completed else store).job_statements(), store.reserve(3)
        lost = mine[nth_is_lost]
        assert statements.begins(connection, [worker_values(store, job) for job in mine]) == [True] * 3
        store.release([lost])
        session = open_session(kind, connection)
        for job in mine:
            session.execute("BEGIN")
            lab.Square.insert1({**job.key, "result": 1}, allow_direct_insert=True)
            with pytest.raises(LeaseLostError) if job == lost else nullcontext():
                statements.finish_or_undo(LastStatement(session), worker_values(store, job))
            session.execute("ROLLBACK")
        session.close()
        assert len(lab.Square()) == 2
        assert not lab.Square & lost.key
        assert statuses(jobs) == ({"pending": 4, "success": 2} if keep_completed else {"pending": 4})

    @pytest.mark.parametrize("server", ["mysql"], indirect=True)
    def test_a_trigger_that_refuses_the_end_of_a_job_is_not_taken_for_a_lost_lease(
        self, store: JobsTable, jobs: Jobs, connection: Any
    ) -> None:
        (job,) = store.reserve(1)
        statements, session = store.job_statements(), open_session(MariaDBSession, connection)
        assert statements.begins(connection, [worker_values(store, job)]) == [True]
        connection.query(
            f"CREATE TRIGGER `{store.spec.schema}`.refuse BEFORE DELETE ON {jobs.full_table_name} "
            "FOR EACH ROW SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'the lab keeps its jobs'"
        )
        with pytest.raises(Exception, match="the lab keeps its jobs"):
            statements.finish_or_undo(LastStatement(session), worker_values(store, job))
        session.execute("ROLLBACK")

    @pytest.mark.parametrize("worth_preparing", [3, 4])
    def test_a_worker_tells_what_is_left_of_a_group_of_which_a_job_was_lost(
        self,
        lab: ModuleType,
        open_store: OpenStore,
        monkeypatch: pytest.MonkeyPatch,
        worth_preparing: int,
    ) -> None:
        monkeypatch.setattr(make_session, "WORTH_PREPARING", worth_preparing)
        pipelines.fill(lab)
        assert endings_of_a_group(open_store(lab.Stolen), lab.Stolen()) == [
            "LEASE_LOST",
            "NOT_STARTED",
            "NOT_STARTED",
        ]
        assert len(lab.Stolen()) == 0

    @pytest.mark.parametrize("worth_preparing", [3, 4])
    def test_a_worker_tells_what_is_left_of_a_group_at_whose_end_the_connection_was_lost(
        self,
        lab: ModuleType,
        open_store: OpenStore,
        monkeypatch: pytest.MonkeyPatch,
        worth_preparing: int,
    ) -> None:
        monkeypatch.setattr(make_session, "WORTH_PREPARING", worth_preparing)
        query = LastStatement.query

        def lose(last: LastStatement, *args: Any, **kwargs: Any) -> LastStatement:
            last._session.connection.close()
            return query(last, *args, **kwargs)

        monkeypatch.setattr(LastStatement, "query", lose)
        pipelines.fill(lab)
        assert endings_of_a_group(open_store(lab.Square), lab.Square()) == [
            "TRANSIENT",
            "NOT_STARTED",
            "NOT_STARTED",
        ]
        assert len(lab.Square()) == 0

    @pytest.mark.parametrize("status", ["pending", "error", "success", "ignore"])
    def test_a_job_that_is_not_reserved_any_more_is_not_changed(
        self, store: JobsTable, jobs: Jobs, connection: Any, status: str
    ) -> None:
        (job,) = store.reserve(1)
        jobs.update1({**job.key, "status": status})
        before = rows(jobs)
        statements = store.job_statements()
        assert statements.begins(connection, [worker_values(store, job)]) == [False]
        with pytest.raises(LeaseLostError):
            statements.finish_or_undo(connection, worker_values(store, job))
        assert rows(jobs) == before


def locked(store: JobsTable, connection: sa.Connection) -> AbstractContextManager[bool]:
    return advisory_lock(connection, store.spec.settings.backend, str(store._where.table))


@contextmanager
def holding_the_lock_of(store: JobsTable) -> Iterator[None]:
    """Hold the lock of those who refresh a store's table."""
    with store._shared.engine().begin() as connection, locked(store, connection):
        yield


class TestRefreshing:
    def test_runs_of_a_table_take_turns_where_each_would_insert_the_same_keys(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs
    ) -> None:
        store = open_store(lab.Square)
        with ThreadPoolExecutor(1) as pool:
            with holding_the_lock_of(open_store(lab.Square)):
                refresh = pool.submit(store.refresh)
                assert wait([refresh], timeout=0.5).not_done
                assert len(jobs) == 0
            assert refresh.result() == counts(added=6)

    def test_a_lock_that_cannot_be_had_is_not_waited_for_without_end(
        self, lab: ModuleType, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipelines.fill(lab)
        monkeypatch.setattr("djdist.job_stores.jobs_table.advisory_lock.LONGEST_WAIT_SECONDS", 1)
        with holding_the_lock_of(open_store(lab.Square)):
            assert open_store(lab.Square).refresh() == counts(added=6)

    def test_the_lock_ends_with_an_error(self, lab: ModuleType, open_store: OpenStore) -> None:
        store, other = open_store(lab.Square), open_store(lab.Square)
        with ThreadPoolExecutor(1) as pool, store._shared.engine().connect() as connection:
            with pytest.raises(ZeroDivisionError), connection.begin(), locked(store, connection):
                raise ZeroDivisionError
            assert wait([pool.submit(other.refresh)], timeout=LONGEST_WAIT_SECONDS / 2).done

    @pytest.mark.parametrize("end", ["RELEASE_LOCK", "sql_mode = @djdist_mode", "pg_advisory_xact_lock"])
    def test_a_connection_that_is_lost_beside_the_work_is_opened_again(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs, end: str
    ) -> None:
        store, lost = open_store(lab.Square), list[str]()

        def lose(connection: sa.Connection, cursor: Any, statement: str, *_: Any) -> None:
            if end in statement and not lost:
                lost.append(statement)
                dbapi.shut(cursor.connection)

        sa.event.listen(store._shared.engine(), "before_cursor_execute", lose)
        store.refresh()
        assert statuses(jobs) == {"pending": 6}
        is_postgresql = store.spec.settings.backend == "postgresql"
        assert bool(lost) == (is_postgresql == end.startswith("pg_"))

    def test_new_keys_enter_as_datajoint_enters_them(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs, native: dj.Job
    ) -> None:
        moments = ("created_time", "scheduled_time")
        native.refresh()
        theirs = [{k: v for k, v in row.items() if k not in moments} for row in rows(jobs)]
        jobs.delete()
        assert open_store(lab.Square).refresh() == counts(added=6)
        assert [{k: v for k, v in row.items() if k not in moments} for row in rows(jobs)] == theirs

    def test_a_second_refresh_adds_nothing(self, lab: ModuleType, open_store: OpenStore, jobs: Jobs) -> None:
        store = open_store(lab.Square)
        store.refresh()
        assert store.refresh() == counts()
        assert statuses(jobs) == {"pending": 6}

    def test_keys_in_the_target_are_not_added(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs
    ) -> None:
        lab.Square.insert([{**key, "result": 0} for key in lab.Session.keys()[:2]], allow_direct_insert=True)
        assert open_store(lab.Square).refresh() == counts(added=4)

    @pytest.mark.parametrize("status", ["reserved", "success", "error", "ignore"])
    def test_jobs_are_left_as_they_are(
        self, store: JobsTable, jobs: Jobs, keys: list[dict[str, Any]], status: str
    ) -> None:
        jobs.update1({**keys[0], "status": status})
        before = rows(jobs)
        assert store.refresh() == counts()
        assert rows(jobs) == before

    def test_no_refresh_changes_nothing(self, lab: ModuleType, open_store: OpenStore, jobs: Jobs) -> None:
        assert open_store(lab.Square, refreshes=False).refresh() == counts()
        assert len(jobs) == 0

    @pytest.mark.parametrize("priority", [-128, 0, 127])
    def test_new_jobs_get_the_priority(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs, priority: int
    ) -> None:
        open_store(lab.Square, priority=priority).refresh()
        assert set(jobs.to_arrays("priority")) == {priority}

    @pytest.mark.parametrize("delay", [1000, 1000.5])
    def test_delayed_jobs_wait(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs, delay: float
    ) -> None:
        store = open_store(lab.Square, delay=delay)
        assert store.refresh() == counts(added=6)
        assert store.reserve(6) == []
        age(jobs, "scheduled_time", 1001)
        assert len(store.reserve(6)) == 6

    @pytest.mark.parametrize("status", ["success", "error"])
    def test_done_jobs_leave_when_their_key_and_result_have_left(
        self, lab: ModuleType, store: JobsTable, jobs: Jobs, keys: list[dict[str, Any]], status: str
    ) -> None:
        jobs.update1({**keys[0], "status": status})
        jobs.update1({**keys[1], "status": "ignore"})
        for key in keys[:3]:
            (lab.Session & key).delete_quick()
        assert store.refresh() == counts(removed=1)
        assert not jobs & keys[0]
        assert len(jobs) == 5

    def test_stale_jobs_leave_when_they_are_old_enough(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs, keys: list[dict[str, Any]]
    ) -> None:
        (lab.Session & keys[0]).delete_quick()
        store = open_store(lab.Square, stale_timeout=500)
        assert store.refresh() == counts()
        age(jobs, "created_time", 1000)
        assert open_store(lab.Square, stale_timeout=0).refresh() == counts()
        assert store.refresh() == counts(removed=1)
        assert not jobs & keys[0]
        assert len(jobs) == 5

    def test_stale_jobs_that_run_or_are_ignored_stay(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs, keys: list[dict[str, Any]]
    ) -> None:
        open_store(lab.Square).reserve(1)
        jobs.update1({**keys[1], "status": "ignore"})
        for key in keys[:3]:
            (lab.Session & key).delete_quick()
        age(jobs, "created_time", 1000)
        assert open_store(lab.Square, stale_timeout=500).refresh() == counts(removed=1)
        assert statuses(jobs) == {"reserved": 1, "ignore": 1, "pending": 3}

    def test_restrictions_do_not_make_the_other_jobs_stale(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs, keys: list[dict[str, Any]]
    ) -> None:
        age(jobs, "created_time", 1000)
        assert open_store(lab.Square, "subject_id = 1", stale_timeout=500).refresh() == counts()
        assert len(jobs) == 6

    def test_completed_jobs_without_a_result_are_pending_again(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs, keys: list[dict[str, Any]]
    ) -> None:
        lab.Square.insert1({**keys[0], "result": 0}, allow_direct_insert=True)
        for key in keys[:3]:
            jobs.update1({**key, "status": "success", "duration": 3.0, "connection_id": 9, "version": "old"})
        assert open_store(lab.Square).refresh() == counts()
        with dj.config.override(jobs=dj.config.jobs.model_copy(update={"keep_completed": True})):
            assert open_store(lab.Square, priority=7).refresh() == counts(re_pended=2)
        assert row(jobs, keys[0])["status"] == "success"
        again = row(jobs, keys[1])
        assert (again["status"], again["priority"], again["duration"]) == ("pending", 7, None)
        assert (again["connection_id"], again["version"]) == (0, "")

    def test_old_native_reservations_are_freed_but_no_live_ones_of_a_run(
        self, lab: ModuleType, open_store: OpenStore, native: dj.Job, keys: list[dict[str, Any]]
    ) -> None:
        run = open_store(lab.Square, lease_seconds=65_535)
        native.reserve(keys[0])
        mine = run.reserve(1)
        age(native, "reserved_time", 1000, "status = 'reserved'")
        native.reserve(keys[2])
        assert open_store(lab.Square).refresh() == counts()
        assert open_store(lab.Square, orphan_timeout=500).refresh() == counts(orphaned=1)
        assert row(native, keys[0])["status"] == "pending"
        assert native.reserved.keys(order_by="priority") == [*keys_of(mine), keys[2]]

    def test_one_insert_however_many_the_keys(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs
    ) -> None:
        store = open_store(lab.Square)
        add_sessions(lab, 400)
        with counting_statements() as statements:
            assert store.refresh() == counts(added=406)
        assert len([statement for statement in statements if statement.startswith("INSERT")]) == 1
        assert len(statements) <= 10

    def test_refreshes_at_once_add_each_key_once(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs
    ) -> None:
        add_sessions(lab, 400)
        stores = [open_store(lab.Square) for _ in range(4)]
        added = at_once(4, lambda number: stores[number].refresh()["added"])
        assert sum(added) == 406
        assert statuses(jobs) == {"pending": 406}

    def test_refreshes_while_others_reserve_and_finish(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs
    ) -> None:
        add_sessions(lab, 200)
        stores = [open_store(lab.Square) for _ in range(4)]
        stores[0].refresh()

        def work(number: int) -> list[Job]:
            done: list[Job] = []
            while found := stores[number].reserve(5):
                stores[number].refresh()
                for job in found:
                    stores[number].fail(job, FAILURE)
                done += found
            return done

        given = [job.identity for part in at_once(4, work) for job in part]
        assert len(given) == len(set(given)) == 206
        assert statuses(jobs) == {"error": 206}

    def test_the_key_source_is_the_tables_own(self, lab: ModuleType, open_store: OpenStore) -> None:
        pipelines.fill(lab)
        assert open_store(lab.Filtered).refresh() == counts(added=4)

    def test_renamed_foreign_keys_keep_their_names(self, lab: ModuleType, open_store: OpenStore) -> None:
        pipelines.fill(lab)
        store = open_store(lab.Renamed)
        assert store.refresh() == counts(added=6)
        assert set(store.reserve(1)[0].key) == {"subject_id", "day"}

    @pytest.fixture
    def finer(self, lab: ModuleType) -> type[dj.Computed]:
        """A table with two keys for each of two sessions, of which the jobs table knows the session only."""
        schema = dj.Schema(lab.SCHEMA)

        class Choice(dj.Lookup):
            definition = "choice : int32"
            contents = ((1,), (2,))

        class Finer(dj.Computed):
            definition = """
            -> Session
            choice : int32
            """

            @property
            def key_source(self) -> Any:
                return lab.Session * Choice

            def make(self, key: dict[str, Any]) -> None:
                self.insert1(key)

        pipelines.fill(lab, subjects=1, sessions=2)
        schema(Choice)
        schema(Finer, context={"Session": lab.Session})
        return Finer

    def test_keys_that_share_a_job_are_added_once(
        self, finer: type[dj.Computed], open_store: OpenStore
    ) -> None:
        store = open_store(finer)
        assert store.refresh() == counts(added=2)
        assert store.refresh() == counts()
        assert len(store.reserve(9)) == 2

    def test_a_job_stays_until_all_its_keys_are_made(
        self, finer: type[dj.Computed], open_store: OpenStore
    ) -> None:
        first, second = (finer().key_source & "choice = 1").keys()
        made = [{**first, "choice": 1}, {**first, "choice": 2}, {**second, "choice": 1}]
        finer.insert(made, allow_direct_insert=True)
        store = open_store(finer)
        assert store.refresh() == counts(added=1)
        (job,) = store.reserve(9)
        assert job.key["session_date"] == second["session_date"]


def counts(**changed: int) -> dict[str, int]:
    return {"added": 0, "removed": 0, "orphaned": 0, "re_pended": 0, **changed}


WORDS = ["50% of 'it' :x", "50 of them", "a:b", "a%b", "ab", "%", "it's", "100%%", "a::b", "back\\slash", ""]


def following(store: JobsTable, table: str, *names: str) -> JobsTable:
    """Give a run's store as it is where a table upstream is followed by attributes of the same names."""
    spec, names = store.spec, names or store.spec.key
    quote = dj.conn().adapter.quote_identifier
    sql = f"SELECT * FROM ({spec.new_keys_sql}) AS new WHERE ({PARENTS})"
    follow = Following(table, tuple(map(quote, names)), names, spec.uuids & {*names}, sql)
    return replace(store, spec=replace(spec, follows=(follow,)))


def parents_in(lab: ModuleType) -> list[Job]:
    return [Job("Session", key) for key in lab.Session.keys(order_by="KEY")]


class TestNewKeys:
    """What comes of keys that have just been made."""

    @pytest.fixture
    def parents(self, lab: ModuleType, jobs: Jobs) -> list[Job]:
        return parents_in(lab)

    @pytest.fixture
    def store(self, lab: ModuleType, jobs: Jobs, open_store: OpenStore) -> JobsTable:
        return following(open_store(lab.Square, priority=3), "Session")

    def test_only_those_of_the_given_parents_are_added(
        self, store: JobsTable, parents: list[Job], jobs: Jobs
    ) -> None:
        assert store.add_new(parents[1:4]) == 3
        assert keys_of(store.reserve(9)) == keys_of(parents[1:4])
        assert set(jobs.to_arrays("priority")) == {3}

    def test_nothing_is_added_twice(self, store: JobsTable, parents: list[Job], jobs: Jobs) -> None:
        assert [store.add_new(parents[:n]) for n in (2, 2, 3)] == [2, 0, 1]
        store.reserve(9)
        assert store.add_new(parents) == 3
        assert statuses(jobs) == {"reserved": 3, "pending": 3}

    def test_what_is_made_is_not_added(self, lab: ModuleType, store: JobsTable, parents: list[Job]) -> None:
        lab.Square.insert1({**parents[0].key, "result": 1}, allow_direct_insert=True)
        assert store.add_new(parents) == 5

    def test_parents_that_the_table_does_not_follow_add_nothing(
        self, store: JobsTable, parents: list[Job]
    ) -> None:
        assert store.add_new([]) == store.add_new([Job("Other", job.key) for job in parents]) == 0

    def test_a_part_of_the_key_adds_all_that_has_it(self, store: JobsTable, parents: list[Job]) -> None:
        subjects = following(store, "Subject", "subject_id")
        assert subjects.add_new([Job("Subject", {"subject_id": 1})] * 2) == 3

    def test_a_run_that_takes_the_jobs_as_they_are_adds_none(
        self, store: JobsTable, parents: list[Job]
    ) -> None:
        assert replace(store, refreshing=None).add_new(parents) == 0

    def test_restrictions_hold(
        self, lab: ModuleType, jobs: Jobs, open_store: OpenStore, parents: list[Job]
    ) -> None:
        assert following(open_store(lab.Square, {"subject_id": 2}), "Session").add_new(parents) == 3

    def test_one_statement_inserts_some_hundred(
        self, lab: ModuleType, store: JobsTable, parents: list[Job]
    ) -> None:
        add_sessions(lab, 700)
        many = parents_in(lab)
        with counting_statements() as sent:
            assert store.add_new(many) == len(many)
        assert sum(sql.startswith("INSERT") for sql in sent) == 3

    def test_what_is_refreshed_as_a_whole_is_not_waited_for(
        self, lab: ModuleType, store: JobsTable, parents: list[Job], open_store: OpenStore, jobs: Jobs
    ) -> None:
        with holding_the_lock_of(open_store(lab.Square)):
            assert store.add_new(parents) is None
            assert len(jobs) == 0
        assert store.add_new(parents) == len(parents)

    def test_two_runs_add_the_same_at_the_same_time(
        self, lab: ModuleType, open_store: OpenStore, jobs: Jobs
    ) -> None:
        add_sessions(lab, 300)
        parents = parents_in(lab)
        stores = [following(open_store(lab.Square), "Session") for _ in range(3)]

        def add(number: int) -> int:
            return sum(added_at_last(stores[number], parents[n::10]) for n in range(10))

        assert sum(at_once(3, add)) == len(parents)
        assert statuses(jobs) == {"pending": len(parents)}

    @pytest.mark.parametrize("count", [1, 2])
    def test_key_values_of_every_type_find_what_comes_of_them(
        self, lab: ModuleType, open_store: OpenStore, count: int
    ) -> None:
        lab.AnyKey.insert(lab.AnyKey.rows)
        parents = [Job("AnyKey", key) for key in lab.AnyKey.keys()[:count]]
        store = following(open_store(lab.FromAnyKey), "AnyKey")
        with counting_statements() as sent:
            assert store.add_new(parents) == count
        assert described(keys_of(store.reserve(9))) == described(keys_of(parents))
        assert not [sql for sql in sent if "1234.5" in sql]

    def test_null_in_a_key_finds_nothing(self, store: JobsTable, parents: list[Job]) -> None:
        nothing = Job("Session", dict.fromkeys(parents[0].key))
        assert store.add_new([nothing]) == 0
        assert store.add_new([nothing, *parents]) == 6


def coming_of(table: str, *names: str, sql: str, jobs_table: str | None = None) -> Following:
    """Tell how keys that come of another table's are found by attributes of the same names."""
    columns = tuple(map(dj.conn().adapter.quote_identifier, names))
    return Following(table, columns, names, frozenset(), sql, jobs_table)


class TestHeldBack:
    def test_counts_what_is_to_come_of_failed_jobs_upstream(
        self, lab: ModuleType, store: JobsTable, jobs: Jobs
    ) -> None:
        counted = f"SELECT COUNT(*) FROM {lab.Session().full_table_name} AS s WHERE ({PARENTS})"
        follows = [
            coming_of(name, "subject_id", sql=counted, jobs_table=jobs.full_table_name)
            for name in ("Square", "Other")
        ]
        store.spec = replace(store.spec, held_back=tuple(follows[:1]))
        assert store.held_back() == {}
        jobs.update1({**store.reserve(1)[0].key, "status": "error"})
        assert store.held_back() == {"Square": 3}


OpenMissing = Callable[..., MissingKeys]


def missing_keys_spec(table: Any, **given: Any) -> KeysSpec:
    """Tell what there is to know of a table, as the plan of a run does."""
    todo = table()._jobs_to_do(())
    is_binary = table().connection.adapter.backend == "mysql"
    return KeysSpec(
        settings=settings_of(table().connection),
        table=table.__name__,
        schema=table.database,
        key=tuple(todo.primary_key),
        uuids=frozenset(name for name in todo.primary_key if is_binary and todo.heading[name].uuid),
        missing_keys_sql=_plain_sql(missing_keys(todo, table(), in_order=True)),
        **given,
    )


class TestMissingKeys(JobStoreContract):
    """The keys that a table lacks, for a run without a jobs table."""

    @pytest.fixture
    def open_missing(self) -> Iterator[OpenMissing]:
        with ExitStack() as stack:

            def open_missing(table: Any, failed: dict[str, list[Job]] | None = None, **given: Any) -> Any:
                spec = missing_keys_spec(table, **given)
                transactions = stack.enter_context(closing(Transactions(spec.settings, 2.0)))
                return MissingKeys(spec, transactions, {} if failed is None else failed)

            yield open_missing

    @pytest.fixture
    def keys(self, lab: ModuleType) -> list[dict[str, Any]]:
        pipelines.fill(lab)
        keys: list[dict[str, Any]] = (lab.Square.key_source - lab.Square.proj()).keys()
        return keys

    @pytest.fixture
    def store(self, lab: ModuleType, keys: list[dict[str, Any]], open_missing: OpenMissing) -> MissingKeys:
        store = open_missing(lab.Square)
        assert store.refresh() == {"added": 6, "removed": 0}
        return store

    def test_nothing_that_was_tried_is_given_again(
        self, lab: ModuleType, store: MissingKeys, keys: list[dict[str, Any]]
    ) -> None:
        made, failed, waits = store.reserve(3)
        lab.Square.insert1({**made.key, "result": 1}, allow_direct_insert=True)
        store.forget(made)
        store.fail(failed, FAILURE)
        store.release([waits], delay_seconds=60)
        for _ in range(2):
            assert store.refresh() == {"added": 0, "removed": 0}
        assert keys_of(store.reserve(9)) == keys[3:]

    def test_what_others_have_made_is_dropped(
        self, lab: ModuleType, store: MissingKeys, keys: list[dict[str, Any]]
    ) -> None:
        mine = store.reserve(1)
        made = [{**key, "result": 1} for key in keys[:3]]
        lab.Square.insert(made, allow_direct_insert=True)
        assert store.refresh() == {"added": 0, "removed": 2}
        assert store.reserved() == mine
        assert keys_of(store.reserve(9)) == keys[3:]

    @pytest.mark.parametrize("end", [MissingKeys.forget, partial(MissingKeys.fail, failure=FAILURE)])
    def test_a_key_may_end_while_another_thread_refreshes(
        self, store: MissingKeys, end: Callable[[MissingKeys, Job], Any]
    ) -> None:
        class EndsMeanwhile(dict[str, Any]):
            def values(self) -> Any:
                ending = threading.Thread(target=end, args=(store, last), daemon=True)
                ending.start()
                ending.join(0.2)  # it has to wait until the refresh is through
                return super().values()

        first, last = store.reserve(2)
        store._reserved[first.identity] = replace(first, key=EndsMeanwhile(first.key))
        store.refresh()
        wait_until(lambda: store.reserved() == [first], "the key to end")

    def test_what_failed_under_a_lost_driver_is_left_out_and_holds_back(
        self, lab: ModuleType, store: MissingKeys, open_missing: OpenMissing
    ) -> None:
        job, *others = store.reserve(9)
        failed = dict[str, list[Job]]()
        successor = open_missing(lab.Square, failed=failed)
        successor.leave_out([job])
        successor.refresh()
        assert (successor.reserve(9), failed) == (others, {"Square": [job]})

    def test_a_key_comes_again_that_was_away(self, lab: ModuleType, store: MissingKeys) -> None:
        store.fail(store.reserve(1)[0], FAILURE)
        sessions = lab.Session.to_dicts()
        lab.Session.delete_quick()
        assert len(store._failed["Square"]) == 1
        assert store.refresh() == {"added": 0, "removed": 5}
        assert store._failed["Square"] == []
        lab.Session.insert(sessions)
        assert store.refresh() == {"added": 6, "removed": 0}

    def test_keys_come_in_datajoints_order_with_its_types(
        self, lab: ModuleType, open_missing: OpenMissing
    ) -> None:
        lab.AnyKey.insert(lab.AnyKey.rows)
        store = open_missing(lab.FromAnyKey)
        store.refresh()
        native = lab.FromAnyKey().key_source.keys()
        given = keys_of(store.reserve(9))
        assert [[*map(type, key.values())] for key in given] == [[*map(type, key.values())] for key in native]
        assert given == native

    def test_lets_in_what_comes_of_parents(self, lab: ModuleType, open_missing: OpenMissing) -> None:
        pipelines.fill(lab)
        sql = f"SELECT subject_id, session_date FROM {lab.Session().full_table_name} AS s WHERE ({PARENTS})"
        follow = coming_of("Session", "subject_id", "session_date", sql=sql)
        store, parents = open_missing(lab.Square, follows=(follow,)), parents_in(lab)
        assert store.add_new(parents[1:3]) == 2
        assert store.add_new([Job("Other", job.key) for job in parents]) == 0
        assert store.add_new(parents[:3]) == 1
        assert keys_of(store.reserve(9)) == [parents[n].key for n in (1, 2, 0)]
        assert store.add_new(parents) == 3

    def test_counts_what_is_held_back_by_errors_of_other_tables(
        self, lab: ModuleType, open_missing: OpenMissing
    ) -> None:
        pipelines.fill(lab)
        counted = f"SELECT COUNT(*) FROM {lab.Session().full_table_name} AS s WHERE ({PARENTS})"
        failed: dict[str, list[Job]] = {}
        upstream = open_missing(lab.Square, failed)
        below = open_missing(
            lab.Upstream, failed, held_back=(coming_of("Square", "subject_id", sql=counted),)
        )
        assert below.held_back() == {}
        upstream.refresh()
        upstream.fail(upstream.reserve(1)[0], FAILURE)
        both = PipelineStore({"Square": upstream, "Upstream": below})
        assert pickle.loads(pickle.dumps(both)).of("Upstream").held_back() == {"Square": 3}
        assert both.held_back() == {"Square": 3}

    def test_new_keys_may_come_while_others_are_taken(
        self, lab: ModuleType, store: MissingKeys, keys: list[dict[str, Any]]
    ) -> None:
        add_sessions(lab, 300)

        def work(number: int) -> list[Job]:
            if number % 2:
                store.refresh()
            return [job for _ in range(200) for job in store.reserve(1)]

        given = [job.identity for jobs in at_once(4, work) for job in jobs]
        assert len(given) == len({*given}) == 306

    def test_errors_name_the_key_source(self, lab: ModuleType, open_missing: OpenMissing) -> None:
        store = open_missing(lab.Filtered)
        lab.Filtered.drop_quick()
        with pytest.raises(DatabaseError, match=r"key source of \w+.Filtered can't be read"):
            store.refresh()


def open_pipeline(lab: ModuleType, *tables: Any, lease_seconds: int = 60) -> PipelineStore:
    """Open the store of a new run over several tables."""
    planned, owner = plan_of([*tables]), Owner(new_token(lease_seconds), "me", "v1")
    transactions = Transactions(settings_of(tables[0].connection), 2.0)
    stores: dict[str, JobStore] = {}
    for member in planned.tables:
        jobs = jobs_of(member.table)
        spec = jobs_table_spec_of(planned, member, jobs)
        stores[member.name] = JobsTable(spec, owner, None, refreshing(jobs), transactions=transactions)
    return PipelineStore(stores)


class TestTablesOfARun:
    @pytest.fixture
    def store(self, lab: ModuleType) -> Iterator[PipelineStore]:
        pipelines.fill(lab)
        with closing(open_pipeline(lab, lab.Square, lab.Upstream)) as store:
            yield store

    @pytest.mark.parametrize("travels", [False, True])
    def test_share_two_connections(self, store: PipelineStore, connection: Any, travels: bool) -> None:
        store = pickle.loads(pickle.dumps(store)) if travels else store
        before = sessions(connection)
        at_once(6, lambda number: [store.rescue() for _ in range(5)])
        assert len(sessions(connection) - before) == 2
        store.close()
        wait_until(lambda: sessions(connection) <= before, "both connections to end")

    def test_have_their_own_errors(self, lab: ModuleType, store: PipelineStore) -> None:
        store.refresh()
        jobs_of(lab.Upstream()).drop()
        with pytest.raises(DatabaseError, match=r"jobs table \w+.~~upstream can't be reached"):
            store.reserve(3)
        assert len(store.of("Square").reserve(9)) == 6

    def test_go_on_while_one_is_dropped(self, lab: ModuleType, store: PipelineStore) -> None:
        store.refresh()
        mine = store.reserve(9)
        jobs_of(lab.Square()).drop()
        add_sessions(lab, 2)
        lab.Square.insert([{**job.key, "result": 1} for job in mine], allow_direct_insert=True)
        for verb in (store.refresh, store.rescue, partial(store.renew, mine), store.release_all):
            with pytest.raises(DatabaseError, match=r"jobs table \w+.~~square can't be reached"):
                verb()
        below = store.of("Upstream")
        reserved = below.reserve(9)
        assert len(reserved) == 6
        age(jobs_of(lab.Upstream()), "reserved_time", 50)
        with pytest.raises(DatabaseError, match="~~square"):
            store.renew([*mine, *reserved])
        age(jobs_of(lab.Upstream()), "reserved_time", 50)
        assert below.rescue() == 0
        with pytest.raises(DatabaseError, match="~~square"):
            store.release_all()
        assert below.pending() == 6

    def test_cost_statements_only_where_something_is_to_be_done(self, lab: ModuleType) -> None:
        """A run over thirty tables asks about all of them only where none is known to have nothing."""
        pipelines.fill(lab)
        members = [lab.Square, lab.Stats, lab.Filtered, lab.Kwargs, lab.Reading, lab.Upstream]
        with closing(open_pipeline(lab, *members)) as store:
            store.of("Square").refresh()
            mine = store.of("Square").reserve(1)
            lab.Square.insert1({**mine[0].key, "result": 1}, allow_direct_insert=True)
            with counting_statements() as sent:
                store.renew(mine)
                at_once = lab.Square.connection.adapter.backend == "postgresql"
                assert len(sent) == (1 if at_once else 2)  # it finds them and changes them
                sent.clear()
                assert store.rescue() == 0
                assert len(sent) == len(members)
                sent.clear()
                assert store.add_new(mine) == 1
            added = [sql for sql in sent if "~~" in sql]
            assert ["~~upstream" in sql for sql in added] == [True]

    def test_wait_only_once_for_a_database_that_is_away(self) -> None:
        asked = list[str]()

        class Away(MemoryStore):
            def rescue(self) -> int:
                asked.append("rescue")
                raise DatabaseError("no answer")

        with pytest.raises(DatabaseError, match="no answer"):
            PipelineStore({name: Away(name) for name in ("Root", "Square")}).rescue()
        assert asked == ["rescue"]

    def test_give_the_most_urgent_first_and_then_the_deepest(
        self, lab: ModuleType, store: PipelineStore
    ) -> None:
        keys = lab.Session.keys(order_by="KEY")
        for table, priorities in ((lab.Square, [5, 5, 2]), (lab.Upstream, [5, 7, 2])):
            jobs_of(table()).insert(
                {**key, "status": "pending", "priority": priority}
                for key, priority in zip(keys, priorities, strict=False)
            )
        assert store.next_priorities() == {"Square": 2, "Upstream": 2}
        assert [job.table for job in store.reserve(1)] == ["Upstream"]
        assert [job.table for job in store.reserve(9, max_priority=5)] == ["Square", "Upstream"] + [
            "Square"
        ] * 2
        assert (store.next_priority(), store.next_priorities()) == (7, {"Upstream": 7})
        assert len(store.reserve(9)) == 1
        assert store.next_priority() is None

    def test_stream_from_one_to_the_next(self, lab: ModuleType, store: PipelineStore) -> None:
        assert store.refresh()["added"] == 6
        made, failed, *_ = store.reserve(9)
        assert store.of("Upstream").add_new([made]) == 0
        lab.Square.insert1({**made.key, "result": 1}, allow_direct_insert=True)
        assert store.add_new([made]) == 1
        assert keys_of(store.of("Upstream").reserve(9)) == [made.key]
        store.fail(failed, FAILURE)
        assert store.held_back() == {"Square": 1}

    def test_lose_nothing_and_make_nothing_twice_under_several_runs_and_native_workers(
        self, lab: ModuleType, server: Any, connection: Any
    ) -> None:
        """Whatever meets: streaming, whole refreshes, renewals, rescues and the workers' statements."""
        count = 60
        pipelines.fill(lab, subjects=1, sessions=count)
        work = SharedWork(lab, server, count)
        for thread in at_once(6, work.as_one_of_many):
            assert thread is None
        assert [len(lab.Square()), len(lab.Upstream())] == [count, count]
        assert [len(jobs_of(table())) for table in (lab.Square, lab.Upstream)] == [0, 0]


class SharedWork:
    """Two tables that two runs, each in two threads, and two native workers make at the same time."""

    def __init__(self, lab: ModuleType, server: Any, count: int) -> None:
        self.lab, self.server, self.count = lab, server, count
        self.runs = [open_pipeline(lab, lab.Square, lab.Upstream) for _ in range(2)]
        self.names = {name: getattr(lab, name)().full_table_name for name in ("Square", "Upstream")}
        self.native = {name: dj.Job(getattr(lab, name)()) for name in self.names}
        for jobs in self.native.values():
            assert jobs.heading.names  # they are read now, not by a connection that threads share
        self.ended = threading.Event()

    def as_one_of_many(self, number: int) -> None:
        with self.server.connect() as connection:
            try:
                if number < 2:
                    self.run(self.runs[number], connection)
                elif number < 4:
                    self.keep(self.runs[number - 2])
                else:
                    self.work_natively(connection)
            except BaseException:
                self.ended.set()
                raise

    def run(self, store: PipelineStore, connection: Any) -> None:
        while not self.is_done(connection):
            for job in store.reserve(3):
                self.make(store, connection, job)
                store.add_new([job])
        self.ended.set()

    def make(self, store: PipelineStore, connection: Any, job: Job) -> None:
        table = store.of(job.table)
        assert isinstance(table, JobsTable)
        statements, values = table.job_statements(), worker_values(table, job)
        assert statements.begins(connection, [values]) == [True]
        with connection.transaction:
            self.insert(connection, job.table, job.key)
            statements.finish_or_undo(connection, values)

    def keep(self, store: PipelineStore) -> None:
        """Do what a run does beside its loop."""
        while not self.ended.is_set():
            store.renew(store.reserved())
            store.rescue()
            store.refresh()
            store.pending()
            store.held_by_others()

    def work_natively(self, connection: Any) -> None:
        while not self.ended.is_set():
            for name, jobs in self.native.items():
                worker = copy(jobs)
                worker._connection = connection
                for key in worker.pending.keys(limit=2):
                    if worker.reserve(key):
                        self.insert(connection, name, key)
                        worker.complete(key)

    def insert(self, connection: Any, name: str, key: dict[str, Any]) -> None:
        connection.query(
            f"INSERT INTO {self.names[name]} (subject_id, session_date, result) VALUES (%s, %s, 1)",
            args=(key["subject_id"], key["session_date"]),
        )

    def is_done(self, connection: Any) -> bool:
        if self.ended.is_set():
            return True
        (made,) = connection.query(f"SELECT COUNT(*) FROM {self.names['Upstream']}").fetchone()
        return bool(made == self.count)


def sessions(connection: Any) -> set[int]:
    """Return the numbers of the sessions that the account has at the server."""
    is_mysql = connection.adapter.backend == "mysql"
    sql = "SELECT id FROM information_schema.processlist" if is_mysql else "SELECT pid FROM pg_stat_activity"
    return {number for (number,) in connection.query(sql).fetchall()}


RESTRICTIONS: dict[str, Any] = {
    "like": "word LIKE 'a%'",
    "like with an escape": "word LIKE '%|%%' ESCAPE '|'",
    "colon": "word = 'a:b'",
    "two colons": "word = 'a::b'",
    "bind parameter": "word <> ':word' AND word LIKE '%:x'",
    "percent": "word = '%'",
    "two percents": "word = '100%%'",
    "format": "word <> '%s' AND word <> '%(word)s'",
    "time": "moment >= '2026-02-28 23:59:59'",
    "dict": {"word": "it's"},
    "dict with all": {"word": "50% of 'it' :x"},
    "list": ["word = 'a:b'", {"word": "%"}],
    "not": dj.Not("word LIKE 'a%'"),
    "and": dj.AndList(["word LIKE 'a%'", "word <> 'ab'"]),
    "nothing": [],
}


class TestKeysAndRestrictions:
    @pytest.fixture
    def words(self, lab: ModuleType) -> ModuleType:
        """`lab.AnyKey` with one row for each of the words."""
        example = lab.AnyKey.rows[0]
        lab.AnyKey.insert({**example, "tiny": tiny, "word": word} for tiny, word in enumerate(WORDS))
        return lab

    @pytest.mark.parametrize("name", RESTRICTIONS)
    def test_restrictions_narrow_refreshing_and_reserving(
        self, words: ModuleType, open_store: OpenStore, name: str
    ) -> None:
        restriction = RESTRICTIONS[name]
        wanted = {row["word"] for row in (words.AnyKey & restriction).to_dicts()}
        store = open_store(words.FromAnyKey, restriction)
        assert store.refresh() == counts(added=len(wanted))
        open_store(words.FromAnyKey).refresh()
        assert store.pending() == len(wanted)
        assert {job.key["word"] for job in store.reserve(100)} == wanted

    def test_a_query_restricts(self, words: ModuleType, open_store: OpenStore) -> None:
        store = open_store(
            words.FromAnyKey, (words.AnyKey & "word LIKE 'a%'").proj(), words.AnyKey & "tiny > 2"
        )
        assert store.refresh() == counts(added=3)
        open_store(words.FromAnyKey).refresh()
        assert {job.key["word"] for job in store.reserve(100)} == {"a%b", "ab", "a::b"}

    def test_another_tables_rows_restrict(self, lab: ModuleType, open_store: OpenStore, jobs: Jobs) -> None:
        lab.Fix.insert(lab.Session.keys()[:2])
        store = open_store(lab.Square, lab.Fix)
        assert store.refresh() == counts(added=2)
        open_store(lab.Square).refresh()
        assert len(store.reserve(6)) == 2

    def test_every_key_is_as_datajoint_gives_it(self, lab: ModuleType, open_store: OpenStore) -> None:
        lab.AnyKey.insert(lab.AnyKey.rows)
        store = open_store(lab.FromAnyKey)
        assert store.refresh() == counts(added=2)
        assert described(keys_of(store.reserve(5))) == described(lab.FromAnyKey().key_source.keys())

    @pytest.mark.parametrize("word", [pytest.param("e", marks=pytest.mark.long), "é"])
    @pytest.mark.parametrize(
        ("server", "charset"),
        [
            ("mysql", "latin1"),
            pytest.param("mysql", "utf8mb4", marks=pytest.mark.long),
            ("real-mysql", "latin1"),
            pytest.param("postgresql", None, marks=pytest.mark.long),
        ],
        indirect=["server"],
    )
    def test_many_keys_of_every_type_find_their_jobs(
        self, lab: ModuleType, open_store: OpenStore, connection: Any, word: str, charset: str | None
    ) -> None:
        """A server may search a list of a thousand values in another way than a short one."""
        count, example, jobs = 1100, lab.AnyKey.rows[0], jobs_of(lab.FromAnyKey())
        if charset:
            connection.query(f"ALTER TABLE {jobs.full_table_name} CONVERT TO CHARACTER SET {charset}")
        lab.AnyKey.insert({**example, "big": number, "word": f"{word}{number}"} for number in range(count))
        store = open_store(lab.FromAnyKey)
        assert store.refresh() == counts(added=count)
        mine = store.reserve(count)
        assert len(mine) == count
        values, statements = [worker_values(store, job) for job in mine], store.job_statements()
        assert statements.begins(connection, values) == [True] * count
        assert not statements.any_made(connection, values)
        statements.hand_back_begun(connection, values)
        assert store.begun(mine) == []
        assert store.release(mine) == count

    def test_every_key_finds_its_job_again(
        self, lab: ModuleType, open_store: OpenStore, connection: Any
    ) -> None:
        lab.AnyKey.insert(lab.AnyKey.rows)
        store, jobs = open_store(lab.FromAnyKey), jobs_of(lab.FromAnyKey())
        store.refresh()
        store.release(store.reserve(5))
        assert statuses(jobs) == {"pending": 2}
        finished, failed = store.reserve(5)
        assert statuses(jobs) == {"reserved": 2}
        statements = store.job_statements()
        assert statements.begins(connection, [worker_values(store, finished)]) == [True]
        statements.finish_or_undo(connection, worker_values(store, finished))
        store.fail(failed, FAILURE)
        assert statuses(jobs) == {"error": 1}
        assert jobs.to_arrays("tiny").tolist() == [failed.key["tiny"]]

    @pytest.mark.parametrize(
        ("server", "kind"), [("mysql", MariaDBSession), ("postgresql", PlannedSession)], indirect=["server"]
    )
    @pytest.mark.parametrize("keep_completed", [False, True])
    @pytest.mark.parametrize("commits", [False, True])
    def test_are_finished_by_what_is_prepared_once(
        self,
        lab: ModuleType,
        open_store: OpenStore,
        connection: Any,
        kind: Any,
        keep_completed: bool,
        commits: bool,
    ) -> None:
        lab.AnyKey.insert(lab.AnyKey.rows)
        store = open_store(lab.FromAnyKey)
        store = keeping(store) if keep_completed else store
        store.refresh()
        mine, lost = store.reserve(2)
        statements, session = store.job_statements(), open_session(kind, connection)
        assert statements.begins(connection, [worker_values(store, job) for job in (mine, lost)]) == [
            True,
            True,
        ]
        store.release([lost])
        finishing = LastStatement(session) if commits else session
        session.execute("BEGIN")
        statements.finish_or_undo(finishing, worker_values(store, mine))
        with pytest.raises(LeaseLostError):
            statements.finish_or_undo(finishing, worker_values(store, lost))
        session.execute("ROLLBACK" if commits else "COMMIT")
        session.close()
        expected = {"pending": 1, "success": 1} if keep_completed else {"pending": 1}
        assert statuses(jobs_of(lab.FromAnyKey())) == expected

    def test_keys_that_do_not_find_their_rows_are_a_clear_error(
        self, lab: ModuleType, open_store: OpenStore
    ) -> None:
        """A float32 as the server sends it isn't equal to what it holds; a run would reserve it for ever."""
        schema = dj.Schema(lab.SCHEMA)

        class Dose(dj.Manual):
            definition = "dose : float32"

        class OfDose(dj.Computed):
            definition = "-> Dose"

            def make(self, key: dict[str, Any]) -> None:
                self.insert1(key)

        schema(Dose)
        schema(OfDose, context={"Dose": Dose})
        Dose.insert([(0.1,), (0.5,)])
        store = open_store(OfDose)
        store.refresh()
        with pytest.raises(DatabaseError, match="decimals"):
            store.reserve(5)
        assert store.pending() == 2

    def test_a_pickled_job_finds_its_row(self, lab: ModuleType, open_store: OpenStore) -> None:
        lab.AnyKey.insert(lab.AnyKey.rows)
        store = open_store(lab.FromAnyKey)
        store.refresh()
        store.release(pickle.loads(pickle.dumps(store.reserve(5))))
        assert store.pending() == 2


def described(keys: list[dict[str, Any]]) -> list[list[tuple[str, str, Any]]]:
    """Keys in an order of their own, with their values' types, which may not differ either."""
    return [
        [(name, type(value).__name__, value) for name, value in key.items()]
        for key in sorted(keys, key=lambda key: int(key["tiny"]))
    ]


HOSTILE = "x'; DROP TABLE a; --"
WORSE = HOSTILE + " \\' \\\" `; DROP TABLE b; %s %(word)s :word {0} '/*"


class TestHostileValues:
    @pytest.fixture
    def store(self, lab: ModuleType, open_store: OpenStore) -> Iterator[JobsTable]:
        lab.AnyKey.insert([{**lab.AnyKey.rows[0], "word": HOSTILE}, lab.AnyKey.rows[1]])
        jobs = jobs_of(lab.FromAnyKey())
        owner = Owner(new_token(60), user=WORSE, version=HOSTILE)
        store = JobsTable(jobs_table_spec(jobs), owner, refreshing=refreshing(jobs))
        yield store
        store.close()

    def test_travel_beside_the_sql_and_are_kept_as_they_are(
        self, lab: ModuleType, store: JobsTable, connection: Any
    ) -> None:
        with counting_statements() as sent:
            store.refresh()
            reserved = {job.key["word"]: job for job in store.reserve(10)}
            job = reserved[HOSTILE]
            store.renew([job])
            statements = store.job_statements()
            assert statements.begins(connection, [{**worker_values(store, job), "worker_host": WORSE}]) == [
                True
            ]
            assert store.begun([job]) == [job]
            store.fail(job, Failure(WORSE, WORSE), WORSE, 7)
        assert not [sql for sql in [*sent, *(s.sql for s in statements.of_one_job)] if "DROP" in sql]
        error = row(jobs_of(lab.FromAnyKey()), {"word": HOSTILE})
        assert [error[name] for name in ("user", "host", "error_message", "error_stack")] == [WORSE] * 4
        assert error["version"] == HOSTILE

    def test_are_finished_and_released_by_parameters_too(
        self, lab: ModuleType, store: JobsTable, connection: Any
    ) -> None:
        store.refresh()
        job = next(job for job in store.reserve(10) if job.key["word"] == HOSTILE)
        with counting_statements() as sent:
            assert store.release([job], delay_seconds=0.001) == 1
            wait_until(store.pending, "the delay to end")
            assert store.reserve(10) == [job]
            values = worker_values(store, job)
            statements = keeping(store).job_statements()
            assert statements.begins(connection, [values]) == [True]
            statements.finish_or_undo(connection, values)
            store.release_all()
        assert not [sql for sql in sent if "DROP" in sql]
        assert row(jobs_of(lab.FromAnyKey()), {"word": HOSTILE})["status"] == "success"

    def test_restrict_to_what_they_name(
        self, lab: ModuleType, store: JobsTable, open_store: OpenStore
    ) -> None:
        restricted = open_store(lab.FromAnyKey, {"word": HOSTILE})
        assert restricted.refresh()["added"] == 1
        assert [job.key["word"] for job in restricted.reserve(10)] == [HOSTILE]
        assert len(lab.AnyKey()) == 2


class TestUnpickling:
    """What others write into the jobs table is never unpickled."""

    @pytest.fixture
    def unpickled(self) -> list[Any]:
        """What was unpickled in this process; Python keeps audit hooks for good."""
        _unpickled.clear()
        if not _hooked:
            sys.addaudithook(_note_unpickling)
            _hooked.append(True)
        pickle.loads(pickle.dumps(Owner(1)))
        assert _unpickled
        _unpickled.clear()
        return _unpickled

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_pickle_in_the_jobs_table_stays_one(
        self, lab: ModuleType, keys: list[dict[str, Any]], jobs: Jobs, unpickled: list[Any], packed: bool
    ) -> None:
        bomb = pickle.dumps(Owner(1))
        jobs.connection.query(
            f"UPDATE {jobs.full_table_name} SET status = 'error', error_message = 'a pickle', "
            "error_stack = %s WHERE priority = 1",
            args=(dj.blob.pack(bomb) if packed else bomb,),
        )
        assert populate(lab.Square, reserve_jobs=True)["success_count"] == 5
        errors = jobs.errors.proj("error_message")
        assert errors.to_dicts() == [{**keys[0], "error_message": "a pickle"}]
        with nullcontext() if packed else pytest.raises(UnicodeDecodeError):
            assert jobs.errors.fetch1("error_stack") == bomb
        assert jobs.retry() == 1
        jobs.refresh()
        assert populate(lab.Square, reserve_jobs=True)["success_count"] == 1
        assert unpickled == []


_unpickled: list[Any] = []
_hooked: list[bool] = []


def _note_unpickling(event: str, arguments: Any) -> None:
    if event == "pickle.find_class":
        _unpickled.append(arguments)


class TestPickles:
    def test_a_copy_belongs_to_the_same_run(self, store: JobsTable, jobs: Jobs) -> None:
        copy = pickle.loads(pickle.dumps(store))
        copy.release(store.reserve(6))
        copy.close()
        assert statuses(jobs) == {"pending": 6}

    def test_the_password_does_not_show(self, store: JobsTable, server: Any) -> None:
        store.pending()
        copy = replace(store)
        assert server.password not in f"{store!r} {store} {store.spec!r} {copy!r} {vars(store)}"
