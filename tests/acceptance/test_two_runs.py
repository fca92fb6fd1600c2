"""Two runs at the same time on one executor, from two threads."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lab as pipelines
from djdist import executors
from lab import doing
from lab.watching import counts, meanwhile, wait_until

pytestmark = [pytest.mark.long_on("ray"), pytest.mark.long_on("dask")]


@pytest.fixture
def shared(remote_executor: Any) -> Any:
    """One executor object for both."""
    return executors.resolve(remote_executor)


def test_both_finish(lab: ModuleType, shared: Any, tmp_path: Path) -> None:
    pipelines.fill(lab)

    def fill_another() -> None:
        wait_until(lambda: doing.begun(tmp_path), "a key")
        try:
            assert lab.Square.populate(reserve_jobs=True, executor=shared)["success_count"] == 6
        finally:
            doing.open_gate(tmp_path)

    with meanwhile(fill_another):
        assert wait_at_gate(lab, shared, tmp_path)["success_count"] == 1
    assert counts(lab.Square) == {}


def test_one_ends_with_an_error_and_the_other_finishes(lab: ModuleType, shared: Any, tmp_path: Path) -> None:
    pipelines.fill(lab)

    def fail() -> None:
        wait_until(lambda: doing.begun(tmp_path), "a key")
        try:
            with pytest.raises(lab.PipelineError):
                lab.Scripted.populate(
                    reserve_jobs=True,
                    executor=shared,
                    make_kwargs={"do": doing.raise_error_of_the_pipeline},
                )
        finally:
            doing.open_gate(tmp_path)

    with meanwhile(fail):
        assert wait_at_gate(lab, shared, tmp_path)["success_count"] == 1
    assert counts(lab.Scripted).get("reserved", 0) == 0
    assert doing.begun(tmp_path) == doing.begun(tmp_path)[:1]


def wait_at_gate(lab: ModuleType, shared: Any, folder: Path) -> Any:
    """Make one key, on one of two slots, that ends when the other run has ended."""
    make_kwargs = {"do": doing.wait_at_gate, "folder": str(folder)}
    return lab.Scripted.populate(reserve_jobs=True, executor=shared, max_calls=1, make_kwargs=make_kwargs)
