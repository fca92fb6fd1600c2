"""A make() that computes with Dask, on the very cluster that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lab as pipelines
from lab import computing, doing
from lab.watching import counts

pytestmark = pytest.mark.on("dask")


@pytest.fixture(scope="module")
def one_thread(modules_folder: Path) -> Iterator[Any]:
    """A client of a cluster whose one thread has to make the keys and to compute their chunks."""
    import distributed

    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


WAYS = [
    computing.compute,
    computing.compute_in_a_worker_client,
    computing.compute_in_chunks_that_compute,
    computing.secede_and_wait,
    computing.wait_for_results,
]


@pytest.mark.parametrize("do", WAYS, ids=lambda do: do.__name__)
def test_it_gets_its_chunks(lab: ModuleType, one_thread: Any, do: Any) -> None:
    pipelines.fill(lab)
    summary = lab.Scripted.populate(reserve_jobs=True, executor=one_thread, make_kwargs={"do": do})
    assert summary == {"success_count": 6, "error_list": []}
    assert len(lab.Scripted()) == 6


@pytest.mark.long
def test_it_is_ended_when_it_takes_too_long(lab: ModuleType, dask_client: Any, tmp_path: Path) -> None:
    pipelines.fill(lab)
    lab.Scripted.populate(
        reserve_jobs=True,
        suppress_errors=True,
        executor=dask_client,
        timeout_seconds=2,
        make_kwargs={"do": computing.compute_without_end_at_the_first, "folder": str(tmp_path)},
    )
    assert counts(lab.Scripted) == {"error": 1}
    assert len(lab.Scripted()) == 5
    assert doing.begun(tmp_path).count(1) == 1
