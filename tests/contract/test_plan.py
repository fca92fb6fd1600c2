"""The plan of a run, made of real tables: order, names, what waits for what, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

from djdist.errors import OptionError
from djdist.pipeline.plan import Plan, plan_of
from servers import Server

Key = dict[str, Any]


class Made(dj.Computed):
    """What all tables here have in common."""

    definition = ""

    def make(self, key: Key) -> None:
        self.insert1(key)


@pytest.fixture
def pipeline(connection: Any, new_schema_name: Callable[[], str]) -> ModuleType:
    """A pipeline over two schemas; a module of its own for each test, since classes are known by it."""
    results, raw = dj.Schema(new_schema_name()), dj.Schema(new_schema_name())  # dropped in this order
    module = ModuleType("my_pipeline")
    vars(module).update(declare(raw, results), raw=raw, results=results)
    return module


def declare(raw: dj.Schema, results: dj.Schema) -> dict[str, Any]:
    class Subject(dj.Manual):
        definition = "subject_id : int32"

    class Session(dj.Manual):
        definition = """
        -> Subject
        session : int32
        ---
        rig = 'east' : varchar(10)
        """

    class Param(dj.Lookup):
        definition = "param : int32"
        contents = ((1,), (2,))

    class Summary(Made):
        definition = "-> Subject"

        class Member(dj.Part):
            definition = """
            -> master
            -> Detection
            """

    class Sorting(Made):
        definition = "-> Detection"

    class Shape(Made):
        definition = "-> Detection.Spike.proj(detected_in='session')"

    class Chosen(dj.Manual):
        definition = """
        -> Sorting
        number : int32
        """

    class FromChosen(Made):
        definition = "-> Chosen"

    class Detection(Made):
        definition = """
        -> Session
        -> Param
        """

        class Spike(dj.Part):
            definition = """
            -> master
            spike : int32
            """

    context = {c.__name__: c for c in (Subject, Session, Param, Detection, Sorting, Chosen)}
    for table in (Subject, Session, Param, Detection):
        raw(table, context=context)
    for table in (Summary, Sorting, Shape, Chosen, FromChosen):
        results(table, context=context)
    # as they stand in the module: in no helpful order
    return {"FromChosen": FromChosen, "Shape": Shape, "Summary": Summary, "Sorting": Sorting, **context}


def names(planned: Plan) -> list[str]:
    return [table.name for table in planned.tables]


def test_tables_come_in_dependency_order_across_schemas_and_through_tables_of_others(
    pipeline: ModuleType,
) -> None:
    found = plan_of(pipeline)
    assert sorted(names(found)) == ["Detection", "FromChosen", "Shape", "Sorting", "Summary"]
    assert names(found)[0] == "Detection"
    assert names(found).index("Sorting") < names(found).index("FromChosen")
    for given in itertools.permutations([pipeline.FromChosen, pipeline.Detection, pipeline.Sorting()]):
        assert names(plan_of([*given])) == ["Detection", "Sorting", "FromChosen"]


def test_schemas_and_virtual_modules_stand_for_the_classes_of_their_tables(pipeline: ModuleType) -> None:
    assert names(plan_of(pipeline.raw)) == ["Detection"]
    assert plan_of([pipeline.results, pipeline.raw])["Sorting"].table.make.__func__ is Made.make
    virtual = dj.VirtualModule("virtual", pipeline.results.database)
    assert sorted(names(plan_of(virtual))) == ["FromChosen", "Shape", "Sorting", "Summary"]
    assert plan_of(virtual)["Sorting"].table.make.__func__ is Made.make


def test_keys_are_followed_through_renames_part_tables_and_tables_of_others(pipeline: ModuleType) -> None:
    found = plan_of(pipeline)
    key = (("subject_id", "subject_id"), ("session", "session"), ("param", "param"))
    for name, upstream in (("Sorting", "Detection"), ("Shape", "Detection"), ("FromChosen", "Sorting")):
        (follow,) = found[name].follows
        assert (found[name].upstream, found[name].after) == ((upstream,), ())
        assert (follow.table, {*follow.attributes}) == (upstream, {*key})
    assert found["Detection"].upstream == found["Detection"].after == ()
    assert (found["Summary"].upstream, found["Summary"].after) == ((), ("Detection",))


def test_what_a_table_needs_and_what_depends_on_it_are_added(pipeline: ModuleType) -> None:
    assert names(plan_of(pipeline.FromChosen)) == ["FromChosen"]
    assert names(plan_of(pipeline.FromChosen, upstream=True)) == ["Detection", "Sorting", "FromChosen"]
    assert names(plan_of(pipeline.Sorting, downstream=True)) == ["Sorting", "FromChosen"]
    everything = {"Detection", "FromChosen", "Shape", "Sorting", "Summary"}
    assert {*names(plan_of(pipeline.Session, downstream=True))} == everything
    assert {*names(plan_of(pipeline.Summary(), upstream=True))} == {"Detection", "Summary"}


def test_key_sources_of_ones_own(pipeline: ModuleType) -> None:
    pipeline.Sorting.key_source = pipeline.Detection & "param = 1"
    pipeline.Shape.key_source = property(lambda table: pipeline.Session & pipeline.Detection)
    found = plan_of([pipeline.Sorting, pipeline.Detection])
    assert (found["Sorting"].upstream, found["Sorting"].follows, found["Sorting"].after) == (
        ("Detection",),
        (),
        (),
    )

    class Counting(Made):
        definition = "-> Session"

        @property
        def key_source(self) -> Any:
            return pipeline.Session & pipeline.Sorting

    pipeline.results(Counting, context={"Session": pipeline.Session})
    found = plan_of([Counting, pipeline.Sorting])
    assert names(found) == ["Sorting", "Counting"]
    assert (found["Counting"].upstream, found["Counting"].after) == ((), ("Sorting",))


def test_names_have_their_schema_where_they_are_ambiguous(pipeline: ModuleType) -> None:
    class Sorting(Made):
        definition = "-> Param"

    pipeline.raw(Sorting, context={"Param": pipeline.Param})
    found = names(plan_of([pipeline.Sorting, Sorting, pipeline.Detection]))
    assert sorted(found) == sorted(
        ["Detection", *(f"{schema.database}.Sorting" for schema in (pipeline.raw, pipeline.results))]
    )


def test_restrictions_apply_to_the_tables_that_have_their_attributes(pipeline: ModuleType) -> None:
    text, given, alternatives = "param = 1", {"subject_id": 1, "param": 2}, ["session = 1", {"session": 2}]
    found = plan_of(
        pipeline, [text, given, alternatives, pipeline.Session & "rig = 'east'", dj.AndList([text])]
    )
    assert len(found["Detection"].restrictions) == 5
    assert found["Shape"].restrictions[:2] == (text, given)
    assert found["Summary"].restrictions[0] == given
    assert not any(
        r in (text, alternatives) for r in found["Summary"].restrictions if isinstance(r, str | list)
    )


def test_a_condition_applies_where_the_database_takes_it(pipeline: ModuleType) -> None:
    if pipeline.raw.connection.adapter.backend == "mysql":
        conditions, everywhere = ["`param` = 1", "CAST(param AS CHAR) LIKE '1%'"], "`subject_id` > 0"
    else:
        params, subjects = (table().full_table_name for table in (pipeline.Param, pipeline.Subject))
        conditions = ['"param" = 1', "param::TEXT ILIKE '1%'", f"param IN (SELECT param FROM {params})"]
        everywhere = f"subject_id IN (SELECT subject_id FROM {subjects})"
    found = plan_of(pipeline, [*conditions, everywhere])
    assert found["Detection"].restrictions == (*conditions, everywhere)
    assert found["Summary"].restrictions == (everywhere,)
    with pytest.raises(OptionError, match=r"restricted by .*parm"):
        plan_of(pipeline, ["\"parm\" = '1'" if "ILIKE" in conditions[1] else "`parm` = '1'"])


@pytest.mark.parametrize(
    ("restriction", "message"),
    [
        (
            "parm = 1",
            r"No table of the run can be restricted by parm in its key source. Did you mean param\?",
        ),
        ({"xyzzy": 1}, r"restricted by xyzzy in its key source. There are: detected_in, "),
        ("rig = 'east'", "restricted by rig in its key source"),
        ([{"sesion": 1}, "param = 1"], r"Did you mean session"),
    ],
)
def test_a_restriction_that_no_table_has_is_an_error(
    pipeline: ModuleType, restriction: Any, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        plan_of(pipeline, [restriction])


def test_what_has_nothing_to_populate_is_an_error(pipeline: ModuleType) -> None:
    empty = ModuleType("empty")
    empty.Session = pipeline.Session  # type: ignore[attr-defined]
    for target in (empty, [empty], []):
        with pytest.raises(
            OptionError, match=r"There is nothing to populate in (empty|an empty list): name a"
        ):
            plan_of(target)
    with pytest.raises(OptionError, match="There is nothing to populate in Param: name a module"):
        plan_of(pipeline.Param, upstream=True)
    assert names(plan_of([empty, pipeline.Sorting])) == ["Sorting"]
    with pytest.raises(OptionError, match=r"Session is not a dj.Computed or dj.Imported table"):
        plan_of([pipeline.Session, pipeline.Sorting])
    with pytest.raises(
        OptionError, match="Spike is a Part table, whose rows its master makes: name Detection"
    ):
        plan_of(pipeline.Detection.Spike)
    with pytest.raises(OptionError, match=r"'Sorting' can't be populated: name a module, a dj\.Schema"):
        plan_of("Sorting")


def test_a_table_without_make_is_an_error_that_names_it(pipeline: ModuleType) -> None:
    class Unmade(dj.Computed):
        definition = "-> Sorting"

    pipeline.results(Unmade, context={"Sorting": pipeline.Sorting})
    for target in (Unmade, [pipeline.Sorting, Unmade], pipeline.results):
        with pytest.raises(OptionError, match="Unmade has no make"):
            plan_of(target)
    with pytest.raises(OptionError, match=r"No class of .*unmade.* with a make\(\) is known here: import"):
        plan_of(pipeline.Sorting, downstream=True)


def test_what_nothing_can_fill_is_an_error(pipeline: ModuleType) -> None:
    class Unmade(dj.Imported):
        definition = "-> Session"

    class Later(Made):
        definition = "-> Unmade"

    pipeline.raw(Unmade, context={"Session": pipeline.Session})
    pipeline.results(Later, context={"Unmade": Unmade})
    for upstream in (False, True):
        with pytest.raises(OptionError, match=r"Nothing can fill Later: it depends on .*unmade.* is empty"):
            plan_of([pipeline.Detection, Later], upstream=upstream)
    pipeline.Subject.insert1({"subject_id": 1})
    pipeline.Session.insert1({"subject_id": 1, "session": 1})
    Unmade.insert1({"subject_id": 1, "session": 1}, allow_direct_insert=True)
    assert names(plan_of(Later, upstream=True)) == ["Later"]


def test_tables_of_two_servers_are_an_error(pipeline: ModuleType, server: Server) -> None:
    with server.connect() as other:
        schema = dj.Schema(pipeline.results.database, connection=other)
        copies = ModuleType("copies")
        schema.make_classes(vars(copies))
        other.conn_info["host"] = "elsewhere"
        with pytest.raises(
            OptionError, match=r"Sorting is on .*:\d+, Shape on elsewhere:\d+: one run has one"
        ):
            plan_of([pipeline.Sorting, copies.Shape])


def test_what_the_code_of_make_reads_is_done_first(pipeline: ModuleType) -> None:
    def reads_its_row(table: Any, key: Key) -> None:
        table.insert1({**key, **(pipeline.Detection & key).fetch1()})

    def reads_all_rows(table: Any, key: Key) -> None:
        table.insert1({**key, "n": len(pipeline.Detection())})

    def reads_what_depends_on_it(table: Any, key: Key) -> None:
        table.insert1({**key, "n": len(pipeline.Sorting()) + len(pipeline.Shape.proj())})

    pipeline.Sorting.make = reads_its_row
    assert plan_of(pipeline)["Sorting"].upstream == ("Detection",)
    pipeline.Sorting.make = reads_all_rows
    found = plan_of(pipeline)["Sorting"]
    assert (found.upstream, found.follows, found.after) == ((), (), ("Detection",))
    pipeline.Detection.make = reads_what_depends_on_it
    assert plan_of(pipeline)["Detection"].after == ()
    pipeline.Shape.make = lambda table, key: table.insert(pipeline.FromChosen & "number = 1")
    whole = plan_of(pipeline)
    assert names(whole).index("FromChosen") < names(whole).index("Shape")
    assert whole["Shape"].after == ("FromChosen",)
