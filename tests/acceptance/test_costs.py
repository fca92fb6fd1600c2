"""What a key costs the database, as counts, which no noise moves."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from itertools import count, islice
from types import ModuleType
from typing import Any

import datajoint as dj
import numpy as np
import pytest
import sqlalchemy as sa

import djdist
import lab as pipelines
from djdist.driver import Driver
from servers import Server

FEW, MANY = 200, 1200
MANY_IN_CHAIN = 600
OF_MAKE = 4
"""BEGIN, SELECT, INSERT, COMMIT."""
OF_MAKE_ALONE = 2


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.long), 2])
def count_for_a_key(
    lab: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Any], Any]]:
    """Tells by how much one more key lets counts grow, in groups as large as on a fast machine."""
    monkeypatch.setattr(djdist.config, "task_seconds", 60.0)
    pipelines.fill(lab, subjects=1, sessions=FEW + MANY)
    with djdist.LocalExecutor(request.param) as executor:

        def count(counter: Callable[[], Any], max_calls: int, **options: Any) -> Any:
            before = counter()
            summary = lab.Square.populate(
                reserve_jobs=True, executor=executor, max_calls=max_calls, **options
            )
            assert summary["success_count"] == max_calls
            return counter() - before

        yield (
            lambda counter, **options: (
                (-count(counter, FEW, **options) + count(counter, MANY, **options)) / (MANY - FEW)
            )
        )


@pytest.mark.long_on("postgresql")
def test_a_key_costs_one_commit_and_no_statement_beyond_those_of_its_make(
    server: Server, connection: Any, count_for_a_key: Callable[[Any], Any]
) -> None:
    commits, statements = count_for_a_key(lambda: commits_and_statements(server, connection))
    assert 0.95 <= commits <= 1.02
    assert statements <= OF_MAKE + 0.2


@pytest.mark.long_on("postgresql")
def test_a_key_that_shares_its_transaction_costs_hardly_more_than_what_its_make_asks(
    server: Server,
    connection: Any,
    count_for_a_key: Callable[..., Any],
) -> None:
    commits, statements = count_for_a_key(
        lambda: commits_and_statements(server, connection), keys_per_transaction="auto"
    )
    assert commits <= 0.1
    assert statements <= OF_MAKE_ALONE + 0.2


def commits_and_statements(server: Server, connection: Any) -> Any:
    if server.backend == "mysql":
        return np.array([status(connection, "Com_commit"), status(connection, "Questions")])
    (number,) = connection.query("SELECT txid_current()").fetchone()  # each that writes gets one
    return np.array([int(number), 0])  # PostgreSQL does not count statements


def test_who_reads_or_debugs_a_call_meets_five_functions_down_to_the_step(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, met = Driver.step, list[str]()

    def note_and_step(driver: Driver) -> bool:
        stack = traceback.extract_stack()
        met[:] = [frame.name for frame in stack if frame.filename.startswith(djdist.__path__[0])]
        return step(driver)

    monkeypatch.setattr(Driver, "step", note_and_step)
    pipelines.fill(lab, subjects=1, sessions=1)
    lab.Square.populate()
    assert met == ["populate", "drive", "drive", "run"]


def status(connection: Any, name: str) -> int:
    """Count what the server has been asked by all its clients."""
    (_, count) = connection.query(f"SHOW GLOBAL STATUS LIKE '{name}'").fetchone()
    return int(count)


@pytest.fixture
def chain(connection: Any, new_schema_name: Callable[[], str]) -> ModuleType:
    """Three tables, each of which reads its parent."""
    schema, module = dj.Schema(new_schema_name()), ModuleType("chain")

    class Number(dj.Manual):
        definition = "n : int32\n---\ny : int32"

    def computed(name: str, parent: Any) -> Any:
        def make(table: Any, key: dict[str, Any]) -> None:
            table.insert1({**key, "y": 1 + int((parent & key).fetch1("y"))})

        members = {"definition": f"-> {parent.__name__}\n---\ny : int32", "make": make}
        return schema(type(name, (dj.Computed,), members), context=vars(module))

    vars(module).update(Number=schema(Number))
    for name, parent in (("First", "Number"), ("Second", "First"), ("Third", "Second")):
        setattr(module, name, computed(name, getattr(module, parent)))
    return module


@pytest.fixture
def drivers_statements() -> Iterator[list[str]]:
    """What drivers have asked the database in this process."""
    asked: list[str] = []

    def note(_: Any, __: Any, sql: str, *___: Any) -> None:
        asked.append(sql)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    yield asked
    sa.event.remove(sa.Engine, "before_cursor_execute", note)


@pytest.fixture
def drivers_trips(drivers_statements: list[str]) -> Iterator[list[str]]:
    """What drivers have sent to the database in this process, with what begins and ends transactions."""

    def note(connection: sa.Connection, what: str) -> None:
        if getattr(connection.connection.dbapi_connection, "autocommit", False) is not True:
            drivers_statements.append(what)

    def begin(connection: sa.Connection) -> None:
        if connection.dialect.name == "postgresql":  # PyMySQL sends nothing
            note(connection, "BEGIN")

    def commit(connection: sa.Connection) -> None:
        note(connection, "COMMIT")

    listeners = {"begin": begin, "commit": commit}
    for name, listener in listeners.items():
        sa.event.listen(sa.Engine, name, listener)
    yield drivers_statements
    for name, listener in listeners.items():
        sa.event.remove(sa.Engine, name, listener)


def test_a_group_of_keys_costs_the_driver_few_trips(
    server: Server, lab: ModuleType, drivers_trips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL reserves by one; MariaDB takes one to choose, one to reserve, and one to commit."""
    monkeypatch.setattr(djdist.config, "task_seconds", 1e-6)
    pipelines.fill(lab, subjects=1, sessions=140)

    def trips(keys: int) -> int:
        drivers_trips.clear()
        assert lab.Square.populate(reserve_jobs=True, max_calls=keys)["success_count"] == keys
        return len(drivers_trips)

    assert (-trips(20) + trips(120)) / 100 <= {"postgresql": 1.2, "mysql": 3.2}[server.backend]


@pytest.mark.long_on("postgresql")
@pytest.mark.long
def test_a_key_of_a_pipeline_costs_no_more_statements_than_one_of_a_single_table(
    server: Server,
    connection: Any,
    chain: ModuleType,
    drivers_statements: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(djdist.config, "task_seconds", 60.0)
    tables = [chain.First, chain.Second, chain.Third]
    numbers = count()

    def counts() -> Any:
        of_all = status(connection, "Questions") if server.backend == "mysql" else 0
        return np.array([of_all, len(drivers_statements)])

    def statements(keys: int, populate: Callable[[], Any]) -> Any:
        chain.Number.insert({"n": n, "y": n} for n in islice(numbers, keys))
        before = counts()
        populate()
        return counts() - before

    def for_a_key(populate: Callable[[], Any]) -> Any:
        more = -statements(FEW, populate) + statements(FEW + MANY_IN_CHAIN, populate)
        return more / MANY_IN_CHAIN / len(tables)

    singly = for_a_key(lambda: [table.populate(reserve_jobs=True) for table in tables])
    whole = for_a_key(lambda: djdist.populate(tables, reserve_jobs=True))
    assert len(chain.Third()) == next(numbers)
    assert (whole - singly <= [0.5, 0.25]).all()


@pytest.mark.long_on("postgresql")
@pytest.mark.long
def test_a_look_at_tables_where_nothing_is_new_takes_few_statements(
    chain: ModuleType, drivers_statements: list[str]
) -> None:
    """Each table is asked at once for new keys and vanished ones, all together for what is due."""
    tables = [chain.First, chain.Second, chain.Third]

    def statements(seconds: float) -> int:
        drivers_statements.clear()
        options: Any = {"watch": True, "poll_seconds": 0.5, "idle_exit_seconds": seconds}
        djdist.populate(tables, reserve_jobs=True, **options)
        return sum("enable_" not in sql for sql in drivers_statements)

    polls = 4 / 0.5
    assert statements(5) - statements(1) <= (polls + 2) * (len(tables) + 1) + 2
