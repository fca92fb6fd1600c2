"""A whole pipeline in one run: what it makes, returns and says beforehand."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import djdist
from contract.test_plan import Key, Made, pipeline
from djdist.errors import OptionError

__all__ = ["pipeline"]

SUBJECTS, SESSIONS, PARAMS = 3, 2, 2
KEYS = SUBJECTS * SESSIONS * PARAMS


@pytest.fixture
def filled(pipeline: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A pipeline whose tables make what depends on those above, and fail at session 1 of subject 2."""
    pipeline.Subject.insert({"subject_id": n} for n in range(SUBJECTS))
    pipeline.Session.insert({"subject_id": n, "session": m} for n in range(SUBJECTS) for m in range(SESSIONS))

    def detect(table: Any, key: Key) -> None:
        if (key["subject_id"], key["session"]) == (2, 1) and not pipeline.Chosen():
            raise ValueError("bad session")
        table.insert1(key)
        table.Spike.insert({**key, "spike": n} for n in range(2))

    def summarize(table: Any, key: Key) -> None:
        table.insert1(key)
        table.Member.insert((pipeline.Detection & key).keys())

    monkeypatch.setattr(pipeline.Detection, "make", detect)
    monkeypatch.setattr(pipeline.Summary, "make", summarize)
    return pipeline


TABLES = ["Detection", "Shape", "Summary", "Sorting"]


def tables(filled: ModuleType) -> list[Any]:
    return [getattr(filled, name) for name in TABLES]


@pytest.mark.parametrize("reserve_jobs", [True, False])
def test_all_that_can_be_made_is_made_and_the_rest_is_explained(
    filled: ModuleType, reserve_jobs: bool
) -> None:
    result = djdist.populate(tables(filled), reserve_jobs=reserve_jobs, suppress_errors=True)
    made = {"Detection": KEYS - 2, "Shape": 2 * (KEYS - 2), "Summary": SUBJECTS, "Sorting": KEYS - 2}
    assert {name: len(getattr(filled, name)()) for name in TABLES} == made
    assert {name: counts["made"] for name, counts in result["tables"].items()} == made
    assert result["success_count"] == sum(made.values())
    assert [(table, error) for table, _, error in result["error_list"]] == [
        ("Detection", "ValueError: bad session")
    ] * 2
    assert result["tables"]["Detection"]["failed"] == 2
    assert result["tables"]["Sorting"].pop("peak_memory") > 0
    assert result["tables"]["Sorting"] == {
        "made": KEYS - 2,
        "failed": 0,
        "held_back": 2,
        "held_back_by": {"Detection": 2},
    }


def test_what_may_be_made_from_any_row_upstream_waits_until_all_are_there(filled: ModuleType) -> None:
    djdist.populate(tables(filled), reserve_jobs=True, suppress_errors=True)
    assert len(filled.Summary.Member()) == KEYS - 2


@pytest.mark.parametrize("reserve_jobs", [True, False])
def test_a_table_with_two_parents_in_the_run_joins_them(filled: ModuleType, reserve_jobs: bool) -> None:
    class Joined(Made):
        definition = """
        -> Sorting
        -> Detection.proj(other='session')
        """

    filled.results(Joined, context={"Sorting": filled.Sorting, "Detection": filled.Detection})
    targets = [Joined, filled.Sorting, filled.Detection]
    assert djdist.populate(targets, dry_run=True).loc["Joined", "later"] == KEYS * SESSIONS
    result = djdist.populate(targets, reserve_jobs=reserve_jobs, suppress_errors=True)
    assert len(Joined()) == (SUBJECTS - 1) * SESSIONS**2 * PARAMS + PARAMS
    assert result["tables"]["Joined"]["held_back_by"]["Detection"] > 0


def test_a_run_without_suppress_errors_raises_the_first_one(filled: ModuleType) -> None:
    with pytest.raises(ValueError, match="bad session"):
        djdist.populate(tables(filled), reserve_jobs=True)


def test_restrictions_and_the_number_of_calls_hold_for_all_tables(filled: ModuleType) -> None:
    result = djdist.populate(filled, "subject_id = 0", "param = 1", reserve_jobs=True, max_calls=3)
    assert result["success_count"] == 3
    djdist.populate(filled, "subject_id = 0", "param = 1", reserve_jobs=True)
    assert (len(filled.Detection()), len(filled.Sorting()), len(filled.Shape())) == (2, 2, 4)
    assert {*filled.Detection.to_arrays("subject_id")} == {0}


def test_one_table_returns_what_it_always_did(filled: ModuleType) -> None:
    result = djdist.populate(filled.Detection, "subject_id = 0", reserve_jobs=True)
    assert result == {"success_count": SESSIONS * PARAMS, "error_list": []}
    result = djdist.populate(filled.Sorting, "subject_id = 0", upstream=True, reserve_jobs=True)
    assert [*result["tables"]] == ["Detection", "Sorting"]
    assert len(filled.Sorting()) == SESSIONS * PARAMS


def test_make_kwargs_are_given_by_table(filled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    def sort(table: Any, key: Key, threshold: int = 0) -> None:
        given.append(threshold)
        table.insert1(key)

    monkeypatch.setattr(filled.Sorting, "make", sort)
    djdist.populate(
        [filled.Sorting, filled.Detection], "subject_id = 0", make_kwargs={"Sorting": {"threshold": 5}}
    )
    assert given == [5] * SESSIONS * PARAMS
    with pytest.raises(OptionError, match="make_kwargs of a run of several tables is a dict by the table's"):
        djdist.populate([filled.Sorting, filled.Detection], make_kwargs={"threshold": 5})
    with pytest.raises(OptionError, match="needs is a dict by the table's name: Sortign is none"):
        djdist.populate([filled.Sorting, filled.Detection], needs={"Sortign": djdist.Needs()})


def test_needs_in_settings_are_of_tables_that_there_are(
    filled: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = filled.Sorting.database
    known = [f"{schema}.Sorting", f"{schema}.{filled.Summary.table_name}", "of_another_pipeline.Table"]
    monkeypatch.setattr(djdist.config, "needs", {name: {"cpus": 1} for name in known})
    assert djdist.populate(filled.Detection, max_calls=1)["success_count"] == 1
    for name, message in {
        f"{schema}.Sortign": f"{schema} has no Computed or Imported table Sortign: did you mean Sorting?",
        f"{schema}.Session": f"{schema} has no Computed or Imported table Session",
        "Sorting": 'write "schema.Table"',
    }.items():
        with monkeypatch.context() as patch:
            patch.setitem(djdist.config.needs, name, {"cpus": 1})
            with pytest.raises(OptionError, match=re.escape(message)):
                djdist.populate([filled.Sorting, filled.Detection], reserve_jobs=True)
    assert len(filled.Sorting.jobs) == 0


def test_a_dry_run_says_what_would_be_done_and_touches_nothing(filled: ModuleType) -> None:
    before = {*filled.results.list_tables()}
    found = djdist.populate(tables(filled), dry_run=True)
    assert next(iter(found.index)) == "Detection"
    assert found.loc["Detection", ["done", "missing", "later"]].tolist() == [0, KEYS, 0]
    assert found.loc["Sorting", ["done", "missing", "later"]].tolist() == [0, 0, KEYS]
    assert found.loc["Summary", "waits_for"] == "Detection to be done"
    assert {*filled.results.list_tables()} == before
    hidden = filled.raw.connection.query(
        f"SELECT count(*) FROM information_schema.tables WHERE table_name LIKE '~~%%' "
        f"AND table_schema = '{filled.raw.database}'"
    )
    assert hidden.fetchone()[0] == 0

    djdist.populate(tables(filled), reserve_jobs=True, suppress_errors=True)
    found = djdist.populate(filled, dry_run=True)
    assert found.loc["Detection", ["done", "missing", "error"]].tolist() == [KEYS - 2, 2, 2]
    assert found.loc["Sorting", "waits_for"] == "2 errors of Detection hold back 2 keys"
    assert found.loc["FromChosen", "waits_for"] == "Chosen is empty"


def test_a_manual_table_without_rows_is_no_error(pipeline: ModuleType) -> None:
    assert djdist.populate(pipeline)["success_count"] == 0
    found = djdist.populate(pipeline, dry_run=True)
    assert found.loc["Detection", "waits_for"] == "Session is empty"


def test_modules_and_schemas_among_the_restrictions_are_targets(filled: ModuleType) -> None:
    result = djdist.populate(filled.raw, filled.results, "subject_id = 0")
    assert {*result["tables"]} == {*TABLES, "FromChosen"}


def test_a_run_of_a_pipeline_holds_for_dj_schemas_of_other_names(filled: ModuleType) -> None:
    virtual = dj.VirtualModule("virtual", filled.results.database)
    assert "Sorting" in djdist.populate(virtual, filled.raw, "subject_id = 0", upstream=True)["tables"]


def test_what_a_key_needs_is_said_by_the_call_the_settings_or_the_table(
    filled: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def needs(table: Any, key: Key) -> djdist.Needs:
        asked.append(key["session"])
        return djdist.Needs(cpus=0.5)

    monkeypatch.setattr(filled.Detection, "needs", needs, raising=False)
    monkeypatch.setattr(filled.Sorting, "needs", djdist.Needs(cpus=0.25), raising=False)
    found = djdist.populate([filled.Sorting, filled.Detection], dry_run=True)
    assert found["needs"].tolist() == ["what each key says", "0.25 CPUs"]
    djdist.populate([filled.Sorting, filled.Detection], "subject_id = 0", "session = 0")
    assert (len(filled.Sorting()), {*asked}) == (PARAMS, {0})
    asked.clear()
    given = {"Detection": djdist.Needs(), "Sorting": djdist.Needs()}
    djdist.populate([filled.Sorting, filled.Detection], "subject_id = 1", needs=given)
    name = f"{filled.raw.database}.Detection"
    monkeypatch.setattr(djdist.config, "needs", {name: {"cpus": 1}})
    djdist.populate([filled.Sorting, filled.Detection], "subject_id = 0")
    assert asked == []
    found = djdist.populate([filled.Sorting, filled.Detection], dry_run=True)
    assert found["needs"].tolist() == ["1 CPU", "0.25 CPUs"]
    monkeypatch.setattr(filled.Sorting, "needs", 4)
    with pytest.raises(OptionError, match=r"needs of Sorting must be djdist.Needs"):
        djdist.populate([filled.Sorting, filled.Detection])


@pytest.mark.parametrize("reserve_jobs", [True, False])
def test_a_run_that_watches_ends_when_it_was_idle_for_long(filled: ModuleType, reserve_jobs: bool) -> None:
    result = djdist.populate(
        [filled.Sorting, filled.Detection],
        "subject_id = 0",
        reserve_jobs=reserve_jobs,
        watch=True,
        poll_seconds=0.1,
        idle_exit_seconds=0.5,
    )
    assert result["success_count"] == 2 * SESSIONS * PARAMS
