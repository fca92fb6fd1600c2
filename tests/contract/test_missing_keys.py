"""The keys that a run without a jobs table makes are those that DataJoint makes, in its order."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import lab as pipelines
from djdist.jobs.history import count_new
from djdist.jobs.table import jobs_of
from djdist.pipeline.keys import keys_to_make, missing_keys

SUBJECTS, SESSIONS = 200, 10
RESTRICTIONS: dict[str, tuple[Any, ...]] = {
    "none": (),
    "text": ("subject_id > 1",),
    "dict": ({"subject_id": 2},),
    "several": ("subject_id > 1", ["subject_id = 3", "subject_id = 1"]),
    "list of keys": ([{"subject_id": 1, "other": 2}, {"subject_id": 3}],),
    "that fits nothing": ("FALSE",),
}


def native_keys(table: Any, *restrictions: Any) -> list[dict[str, Any]]:
    keys: list[dict[str, Any]] = (table._jobs_to_do(restrictions) - table.proj()).keys()
    return keys


def agree(table: Any, *restrictions: Any) -> bool:
    native = native_keys(table, *restrictions)
    assert keys_to_make(table, restrictions, None) == native
    return keys_to_make(table, restrictions, 2) == native[:2]


def make(table: Any, *keys: dict[str, Any], **values: Any) -> None:
    table.insert([{**key, **values} for key in keys], allow_direct_insert=True)


@pytest.mark.parametrize("restrictions", RESTRICTIONS.values(), ids=[*RESTRICTIONS])
def test_restrictions_hold_as_natively(lab: ModuleType, restrictions: tuple[Any, ...]) -> None:
    pipelines.fill(lab, subjects=3, sessions=4)
    make(lab.Square, *lab.Session.keys()[::3], result=0)
    make(lab.Renamed, {"subject_id": 2, "day": pipelines.FIRST_DATE}, result=0)
    for table in (lab.Square(), lab.Filtered(), lab.Renamed()):
        assert agree(table, *restrictions)


def test_values_are_of_the_types_that_datajoint_gives(lab: ModuleType) -> None:
    lab.AnyKey.insert(lab.AnyKey.rows)
    for restriction in ("TRUE", "word LIKE '50%:x%'", {"word": lab.AnyKey.rows[0]["word"]}):
        assert agree(lab.FromAnyKey(), restriction)
        keys = keys_to_make(lab.FromAnyKey(), (restriction,), None)
        assert [*map(types_of, keys)] == [*map(types_of, native_keys(lab.FromAnyKey(), restriction))]
    make(lab.FromAnyKey, lab.AnyKey.keys()[0], received="")
    assert agree(lab.FromAnyKey())


def types_of(key: dict[str, Any]) -> list[tuple[str, type]]:
    return [(name, type(value)) for name, value in key.items()]


def test_the_order_is_that_of_datajoint_with_many_keys_too(lab: ModuleType, connection: Any) -> None:
    """Whatever join the server takes."""
    pipelines.fill(lab, subjects=1, sessions=SESSIONS)
    lab.Subject.insert({"subject_id": n} for n in range(SUBJECTS, 1, -1))
    subjects, sessions = lab.Subject().full_table_name, lab.Session().full_table_name
    connection.query(
        f"INSERT INTO {sessions} SELECT a.subject_id, b.session_date, b.n "
        f"FROM {subjects} a, {sessions} b WHERE a.subject_id > 1"
    )
    connection.query(
        f"INSERT INTO {lab.Square().full_table_name} (subject_id, session_date, result) "
        f"SELECT subject_id, session_date, n FROM {sessions} WHERE n < 8"
    )
    assert len(keys_to_make(lab.Square(), (), None)) == SUBJECTS * (SESSIONS - 7)
    assert agree(lab.Square())
    assert agree(lab.Square(), "subject_id < 20")


def test_no_server_looks_for_each_key_in_a_list_of_all(lab: ModuleType, connection: Any) -> None:
    sql = missing_keys(lab.Square()._jobs_to_do(()), lab.Square()).make_sql()
    plan = " ".join(map(str, connection.query(f"EXPLAIN {sql}").fetchall()))
    assert "SubPlan" not in plan
    assert "SUBQUERY" not in plan


@pytest.fixture
def schema(lab: ModuleType) -> dj.Schema:
    pipelines.fill(lab, subjects=2, sessions=2)
    schema = dj.Schema(lab.SCHEMA)
    schema(Grade).insert([{"grade": 5}, {"grade": 6}])
    schema(Choice, context={"Grade": Grade})
    return schema


class Grade(dj.Manual):
    definition = "grade : int32"


class Choice(dj.Manual):
    definition = """
    choice : int32
    ---
    -> [nullable] Grade
    """


def test_several_keys_may_fall_on_one_job(lab: ModuleType, schema: dj.Schema) -> None:
    class Finer(dj.Computed):
        definition = """
        -> Session
        ---
        -> Choice
        """

        @property
        def key_source(self) -> Any:
            return lab.Session * Choice

        def make(self, key: dict[str, Any]) -> None:
            self.insert1(key)

    Choice.insert([{"choice": 1}, {"choice": 2}])
    schema(Finer, context={"Session": lab.Session, "Choice": Choice})
    make(Finer, lab.Session.keys()[0], choice=2)
    assert agree(Finer())
    assert agree(Finer(), "choice = 1")
    assert (len(keys_to_make(Finer(), (), None)), count_new(jobs_of(Finer()))) == (6, 3)


def test_what_is_null_in_a_key_is_treated_as_datajoint_treats_it(schema: dj.Schema) -> None:
    class Graded(dj.Computed):
        definition = "-> Grade"

        @property
        def key_source(self) -> Any:
            return dj.U("grade") & Choice

        def make(self, key: dict[str, Any]) -> None:
            self.insert1(key)

    Choice.insert([(1, 5), (2, None), (3, 6)])
    schema(Graded, context={"Grade": Grade})
    for made in ([], [{"grade": 5}], [{"grade": 6}]):
        make(Graded, *made)
        assert agree(Graded())
