"""How the servers go about the statements on a large jobs table, explained as they are sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa

import lab as pipelines
from djdist._job import Failure, Job
from djdist.database.job_statements import key_values
from djdist.database.sessions import SNAPSHOT_OFF
from djdist.job_stores.jobs_table.lease import new_token
from djdist.job_stores.jobs_table.store import JobsTable, Owner
from djdist.job_stores.jobs_table.transactions import SETTINGS
from djdist.jobs.table import Jobs, jobs_of, refreshing
from djdist.pipeline.jobs_table import jobs_table_spec
from djdist.pipeline.rights import lacking_right

SUBJECTS, SESSIONS = 10_000, 10
MANY = 600


@dataclass(frozen=True)
class Plan:
    """Which tables a server reads as a whole, and which of them for each row of another one."""

    sql: str
    read: tuple[str, ...]
    read_again_and_again: tuple[str, ...]
    sorts: bool

    @property
    def verb(self) -> str:
        return self.sql.removeprefix(SNAPSHOT_OFF).split()[0]


@pytest.fixture
def jobs(lab: ModuleType, connection: Any) -> Jobs:
    """The empty jobs table of `lab.Square` over 100,000 sessions."""
    pipelines.fill(lab, subjects=1, sessions=SESSIONS)
    lab.Subject.insert({"subject_id": n} for n in range(2, SUBJECTS + 1))
    subjects, sessions = lab.Subject().full_table_name, lab.Session().full_table_name
    connection.query(
        f"INSERT INTO {sessions} SELECT a.subject_id, b.session_date, b.n "
        f"FROM {subjects} a, {sessions} b WHERE a.subject_id > 1"
    )
    return jobs_of(lab.Square())


@pytest.fixture
def store(jobs: Jobs) -> Iterator[JobsTable]:
    store = JobsTable(jobs_table_spec(jobs), Owner(new_token(60)), refreshing=refreshing(jobs))
    yield store
    store.close()


def test_what_a_run_asks_grows_neither_by_reading_all_jobs_nor_by_sorting_them(
    store: JobsTable, jobs: Jobs, connection: Any
) -> None:
    """PostgreSQL knows nothing of the table before it analyzes it, perhaps a minute after a refresh."""
    store.refresh()
    for analyzed in (False, True):
        if analyzed:
            update_statistics(jobs)
        with explained(jobs) as plans:
            use(store, jobs, Explaining(connection, plans))
        assert {plan.verb for plan in plans} - {"WITH"} == {"SELECT", "UPDATE", "DELETE"}
        assert [plan for plan in plans if jobs.table_name in plan.read or plan.sorts] == []


def test_a_refresh_reads_each_table_once(store: JobsTable, jobs: Jobs) -> None:
    """It compares all keys, so it has to read them, but not all jobs for each key, though there were none."""
    for added in (SUBJECTS * SESSIONS, 0):
        update_statistics(jobs)
        with explained(jobs) as plans:
            assert store.refresh()["added"] == added
        assert len([plan for plan in plans if plan.sql.startswith("INSERT")]) == 1
        assert [plan for plan in plans if plan.read_again_and_again] == []


def test_what_a_worker_tries_before_its_first_key_reads_no_table(
    lab: ModuleType, store: JobsTable, jobs: Jobs, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.refresh()
    plans: list[Plan] = []
    monkeypatch.setattr(lab.Square, "_connection", Explaining(connection, plans))
    assert lacking_right(lab.Square(), store.job_statements()) == ""
    assert [plan.verb for plan in plans] == ["UPDATE", "DELETE", "INSERT"]
    assert [plan for plan in plans if plan.read] == []


def use(store: JobsTable, jobs: Jobs, connection: Explaining) -> None:
    """Ask all that a run asks, for one job and for many."""
    statements = store.job_statements()
    for count in (1, MANY):
        reserved = store.reserve(count)
        assert len(store.renew(reserved)) == count
        assert all(statements.begins(connection, [worker_values(store, job) for job in reserved]))
        assert not statements.any_made(connection, [worker_values(store, job) for job in reserved])
        assert len(store.begun(reserved)) == len(store.begun_by("a worker", 7)) == count
        statements.finish_or_undo(connection, worker_values(store, reserved[0]))
        store.release(reserved)
    (failed,) = store.reserve(1)
    store.fail(failed, Failure("no"))
    store.reserve(MANY)
    store.release_all()
    store.reserve(MANY)
    jobs.connection.query(
        f"UPDATE {jobs.full_table_name} SET reserved_time = reserved_time - INTERVAL '100' SECOND "
        "WHERE status = 'reserved'"
    )
    other = replace(store, owner=Owner(new_token(60)))
    assert other.rescue() == MANY
    other.close()


def worker_values(store: JobsTable, job: Job) -> dict[str, Any]:
    key = key_values(job.key, store.spec.settings.backend)
    return {"worker_host": "a worker", "worker_pid": 7, "seconds": 1.5, **key}


def update_statistics(jobs: Jobs) -> None:
    analyze = "ANALYZE" if jobs.connection.adapter.backend == "postgresql" else "ANALYZE TABLE"
    jobs.connection.query(f"{analyze} {jobs.full_table_name}")


class Explaining:
    """A worker's connection whose statements are explained before they are executed."""

    def __init__(self, connection: Any, plans: list[Plan]) -> None:
        self._connection = connection
        self._plans = plans

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def query(self, query: str, args: Any = ()) -> Any:
        explain = EXPLAIN[self._connection.adapter.backend]
        self._plans.append(explain(query, lambda sql: self._connection.query(sql, args=args)))
        return self._connection.query(query, args=args)


@contextmanager
def explained(jobs: Jobs) -> Iterator[list[Plan]]:
    """Collect the plans of all that stores send meanwhile, each as it is when it is sent."""
    plans: list[Plan] = []
    explain = EXPLAIN[jobs.connection.adapter.backend]

    def note(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        def ask(sql: str) -> Any:
            cursor = connection.connection.cursor()
            cursor.execute(sql, parameters)
            return cursor

        if statement.startswith(("DELETE", "INSERT", "SELECT", "UPDATE", "WITH")):
            plans.append(explain(statement, ask, context.execution_options.get(SETTINGS, "")))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield plans
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def explain_in_mysql(sql: str, ask: Callable[[str], Any], settings: str = "") -> Plan:
    cursor = ask(f"EXPLAIN FORMAT=TRADITIONAL {sql}")
    names = [column[0] for column in cursor.description]
    steps = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    steps = [step for step in steps if step["select_type"] != "INSERT"]
    whole = [step for step in steps if step["type"] in ("ALL", "index")]
    first_steps = [next(step for step in steps if step["id"] == id_) for id_ in {s["id"] for s in steps}]
    joined = [step for step in whole if step not in first_steps and "join buffer" not in str(step["Extra"])]
    again = joined + [step for step in whole if step["select_type"].startswith("DEPENDENT")]
    sorts = any("filesort" in str(step["Extra"]) for step in steps)
    return Plan(sql, _tables(whole, "table"), _tables(again, "table"), sorts)


def explain_in_postgresql(sql: str, ask: Callable[[str], Any], settings: str = "") -> Plan:
    ((found,),) = ask(f"{settings}EXPLAIN (FORMAT JSON) {sql}").fetchall()
    steps = list(_walk((json.loads(found) if isinstance(found, str) else found)[0]["Plan"]))
    scans = [step for step in steps if step["Node Type"].startswith(("Seq Scan", "Index"))]
    whole = [step for step in scans if "Index Cond" not in step]
    again = [step for step in whole if step["again"]]
    sorts = any("Sort" in step["Node Type"] for step in steps)
    return Plan(sql, _tables(whole, "Relation Name"), _tables(again, "Relation Name"), sorts)


def _walk(step: dict[str, Any], again: bool = False) -> Iterator[dict[str, Any]]:
    yield {**step, "again": again}
    for part in step.get("Plans", []):
        inner = step["Node Type"] == "Nested Loop" and part["Parent Relationship"] == "Inner"
        yield from _walk(part, again or inner or part["Parent Relationship"] == "SubPlan")


def _tables(steps: list[dict[str, Any]], name: str) -> tuple[str, ...]:
    return tuple(step[name] for step in steps)


EXPLAIN = {"mysql": explain_in_mysql, "postgresql": explain_in_postgresql}
