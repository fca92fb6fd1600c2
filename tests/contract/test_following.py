"""New keys are found by the keys of what has just been made upstream, in time that these take."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest

from contract.test_plan import Key, Made, pipeline
from djdist.jobs.table import jobs_of
from djdist.pipeline.expected import expected_keys
from djdist.pipeline.jobs_table import jobs_table_spec_of, keys_spec_of
from djdist.pipeline.jobs_table_spec import PARENTS, Following
from djdist.pipeline.plan import Plan, plan_of

__all__ = ["pipeline"]

SUBJECTS, SESSIONS = 3, 2


@pytest.fixture
def filled(pipeline: ModuleType) -> ModuleType:
    pipeline.Subject.insert({"subject_id": n} for n in range(SUBJECTS))
    pipeline.Session.insert({"subject_id": n, "session": m} for n in range(SUBJECTS) for m in range(SESSIONS))
    return pipeline


def make(table: Any, *keys: Key) -> None:
    table.insert(keys, allow_direct_insert=True)


def restricted(following: Following, parents: Sequence[Key]) -> str:
    """Fill in the parents as a store does, which looks for one by an equality."""
    assert following.sql.count(PARENTS) == 1
    columns = f"({', '.join(following.columns)})"
    rows = [f"({', '.join(str(parent[name]) for name in following.names)})" for parent in parents]
    condition = f"{columns} IN ({', '.join(rows)})" if len(rows) > 1 else f"{columns} = {rows[0]}"
    return following.sql.replace(PARENTS, condition)


def both_specs(planned: Plan, name: str) -> Iterator[Any]:
    table = planned[name]
    yield jobs_table_spec_of(planned, table, jobs_of(table.table))
    yield keys_spec_of(planned, table)


def found(planned: Plan, name: str, parents: Sequence[Key]) -> list[list[Key]]:
    """Ask for the new keys of a table, by each kind of spec."""
    query = planned[name].table.connection.query
    return [
        [dict(zip(spec.key, row, strict=True)) for f in spec.follows for row in query(restricted(f, parents))]
        for spec in both_specs(planned, name)
    ]


def test_only_what_comes_of_these_parents_and_is_not_made_is_found(filled: ModuleType) -> None:
    planned = plan_of([filled.Sorting, filled.Detection], ["param = 1"])
    first, second, other = keys = [{"subject_id": 0, "session": 0, "param": n} for n in (1, 2)] + [
        {"subject_id": 1, "session": 1, "param": 1}
    ]
    make(filled.Detection, *keys)
    assert found(planned, "Sorting", [first, second]) == [[first], [first]]
    make(filled.Sorting, first)
    assert found(planned, "Sorting", keys) == [[other], [other]]
    jobs_of(filled.Sorting()).insert1({**other, "status": "pending", "priority": 5})
    assert found(planned, "Sorting", keys) == [[], [other]]
    missing = keys_spec_of(planned, planned["Sorting"]).missing_keys_sql
    assert [*planned["Sorting"].table.connection.query(missing)] == [(1, 1, 1)]


def test_part_tables_and_renamed_attributes_are_followed(filled: ModuleType) -> None:
    planned = plan_of([filled.Detection, filled.Shape])
    key, other = ({"subject_id": 0, "session": n, "param": 1} for n in (0, 1))
    make(filled.Detection, key, other)
    make(filled.Detection.Spike, *({**k, "spike": n} for k in (key, other) for n in range(3)))
    shapes = [{"subject_id": 0, "detected_in": 0, "param": 1, "spike": n} for n in range(3)]
    for keys in found(planned, "Shape", [key]):
        assert sorted(keys, key=lambda shape: shape["spike"]) == shapes


def test_tables_of_others_and_two_foreign_keys_are_followed(filled: ModuleType) -> None:
    class Pair(Made):
        definition = """
        -> Detection.proj(left='session')
        -> Detection.proj(right='session')
        """

    filled.results(Pair, context={"Detection": filled.Detection})
    planned = plan_of([filled.Detection, filled.Sorting, filled.FromChosen, Pair])
    key, other = ({"subject_id": 0, "session": n, "param": 1} for n in (0, 1))
    make(filled.Detection, key, other)
    make(filled.Sorting, key, other)
    filled.Chosen.insert1({**key, "number": 7})
    assert found(planned, "FromChosen", [key]) == [[{**key, "number": 7}]] * 2
    assert found(planned, "FromChosen", [other]) == [[], []]
    pairs = {(1, 0), (1, 1), (0, 1)}
    for keys in found(planned, "Pair", [other]):
        assert {(pair["left"], pair["right"]) for pair in keys} == pairs


def test_what_is_to_come_is_known_down_to_the_last_table(filled: ModuleType) -> None:
    class Last(Made):
        definition = "-> Sorting"

    filled.results(Last, context={"Sorting": filled.Sorting})
    planned = plan_of([filled.Detection, filled.Sorting, Last], ["subject_id > 0"])
    number = (SUBJECTS - 1) * SESSIONS * len(filled.Param())
    assert [len(expected_keys(planned, table)) for table in planned.tables] == [number] * 3
    make(filled.Detection, {"subject_id": 1, "session": 0, "param": 1})
    assert len(expected_keys(planned, planned["Last"])) == number


def test_what_an_error_holds_back_is_counted(filled: ModuleType) -> None:
    planned = plan_of([filled.Detection, filled.Sorting, filled.FromChosen])
    failed = [{"subject_id": n, "session": 0, "param": 1} for n in (0, 1)]
    jobs = jobs_of(filled.Detection())
    jobs.insert([{**key, "status": "error", "priority": 5} for key in failed])
    query = planned["Sorting"].table.connection.query
    with_jobs, without = both_specs(planned, "Sorting")
    (by_jobs,), (by_keys,) = with_jobs.held_back, without.held_back
    assert by_jobs.parent == by_keys.parent == "Detection"
    assert (by_jobs.jobs_table, by_keys.jobs_table) == (jobs.full_table_name, None)
    assert query(restricted(by_keys, failed)).fetchone()[0] == 2
    names = ", ".join(map(jobs.connection.adapter.quote_identifier, by_jobs.names))
    errors = (
        f"({', '.join(by_jobs.columns)}) IN (SELECT {names} FROM {by_jobs.jobs_table} WHERE status = 'error')"
    )
    assert query(by_jobs.sql.replace(PARENTS, errors)).fetchone()[0] == 2


@pytest.mark.parametrize("number", [1, 100])
@pytest.mark.long_on("postgresql")
def test_its_cost_follows_the_parents_not_the_tables(filled: ModuleType, number: int) -> None:
    planned = plan_of([filled.Detection, filled.Sorting, filled.Shape])
    parents = [{"subject_id": 100 + n, "session": 3, "param": 1} for n in range(number)]
    costs: list[list[int]] = []
    for subjects in (range(100, 300), range(300, 6000)):
        add_made(filled, subjects)
        costs.append(
            [
                rows_read(filled.Detection.connection, restricted(spec.follows[0], parents))
                for table in ("Sorting", "Shape")
                for spec in both_specs(planned, table)
            ]
        )
    for few, many in zip(*costs, strict=True):
        assert many < 2 * few + 10


def add_made(pipeline: ModuleType, subjects: Sequence[int]) -> None:
    """Add subjects with ten sessions, all of which are detected and all but number 3 sorted."""
    ten = " UNION ALL ".join(f"SELECT {n} AS session" for n in range(10))
    new = f"subject_id >= {subjects[0]}"
    key = "subject_id, session, param"
    subject, session, detection, spike, sorting, shape = (
        table().full_table_name
        for table in (
            pipeline.Subject,
            pipeline.Session,
            pipeline.Detection,
            pipeline.Detection.Spike,
            pipeline.Sorting,
            pipeline.Shape,
        )
    )
    pipeline.Subject.insert({"subject_id": n} for n in subjects)
    for into, rows in (
        (f"{session} (subject_id, session)", f"SELECT subject_id, session FROM {subject}, ({ten}) AS ten"),
        (f"{detection} ({key})", f"SELECT subject_id, session, 1 FROM {session}"),
        (f"{spike} ({key}, spike)", f"SELECT {key}, 0 FROM {detection}"),
        (f"{sorting} ({key})", f"SELECT {key} FROM {detection}"),
        (f"{shape} (subject_id, detected_in, param, spike)", f"SELECT {key}, 0 FROM {detection}"),
    ):
        made = " AND session <> 3" if into.startswith((sorting, shape)) else ""
        pipeline.Subject.connection.query(f"INSERT INTO {into} {rows} WHERE {new}{made}")


def rows_read(connection: Any, sql: str) -> int:
    """Return how many rows, or on PostgreSQL pages, a server reads for a query."""
    if connection.adapter.backend == "postgresql":
        ((answer,),) = connection.query(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}").fetchall()
        found = (json.loads(answer) if isinstance(answer, str) else answer)[0]["Plan"]
        return int(found["Shared Hit Blocks"] + found["Shared Read Blocks"])
    counters = "SHOW SESSION STATUS LIKE 'Handler_read%%'"
    before, _, after = (connection.query(query).fetchall() for query in (counters, sql, counters))
    return sum(int(count) for _, count in after) - sum(int(count) for _, count in before)


def test_the_query_of_what_is_to_come_stays_small_where_a_graph_forks_and_joins(filled: ModuleType) -> None:
    """It would double with each of these tables."""
    tables, context = [filled.Detection], {"T0": filled.Detection}
    for number in range(1, 12):
        definition = f"-> T{number - 1}\n-> T{max(0, number - 2)}"
        table = type(f"T{number}", (Made,), {"definition": definition, "__module__": __name__})
        context[f"T{number}"] = filled.results(table, context=dict(context))
        tables.append(table)
    planned = plan_of(tables)
    number = SUBJECTS * SESSIONS * len(filled.Param())
    assert [len(expected_keys(planned, planned[f"T{n}"])) for n in (1, 2, 5)] == [number] * 3
    assert len(expected_keys(planned, planned["T11"]).make_sql()) < 100_000
