"""A whole pipeline in one run makes the same rows, and the same errors, as native runs table after table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import djdist
from lab import whole
from lab.watching import counts

Errors = list[tuple[str, str, str]]


@pytest.fixture
def pipeline(connection: Any, new_schema_name: Callable[[], str], modules_folder: Path) -> ModuleType:
    results, raw = new_schema_name(), new_schema_name()  # dropped in this order
    pipeline = whole.declare(raw, results, modules_folder)
    whole.fill(pipeline)
    return pipeline


@pytest.fixture
def native(
    connection: Any, new_schema_name: Callable[[], str], modules_folder: Path
) -> tuple[whole.Rows, Errors]:
    """What plain DataJoint makes of the same pipeline in other schemas, table after table."""
    results, raw = new_schema_name(), new_schema_name()
    pipeline = whole.declare(raw, results, modules_folder, longest_seconds=0)
    whole.fill(pipeline)
    djdist.disable()
    errors = []
    for name in whole.TABLES:
        made = getattr(pipeline, name).populate(
            suppress_errors=True, make_kwargs=whole.MAKE_KWARGS.get(name, {})
        )
        errors += [(name, str(key), message) for key, message in made["error_list"]]
    djdist.enable()
    return whole.rows(pipeline), sorted(errors)


@pytest.mark.parametrize("reserve_jobs", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_run_makes_what_native_runs_table_after_table_make(
    pipeline: ModuleType, native: tuple[whole.Rows, Errors], executor: Any, reserve_jobs: bool
) -> None:
    result = djdist.populate(
        pipeline,
        reserve_jobs=reserve_jobs,
        executor=executor,
        suppress_errors=True,
        make_kwargs=whole.MAKE_KWARGS,
    )
    rows, errors = native
    assert whole.rows(pipeline) == rows
    assert sorted((table, str(key), message) for table, key, message in result["error_list"]) == errors
    assert {name for name, *_ in errors} == {"Recording", "Match"}
    if reserve_jobs:
        left = {name: counts(getattr(pipeline, name)) for name in whole.TABLES}
        failed = {name: {"error": result["tables"][name]["failed"]} for name in ("Recording", "Match")}
        assert {name: count for name, count in left.items() if count} == failed
