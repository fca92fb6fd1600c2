"""Runs on a Dask cluster that other tasks, workers and callers share, such as those of make() itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from lab import computing, doing
from lab.watching import SECONDS, counts, meanwhile, wait_until
from servers import Server

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
    *(
        pytest.param(do, marks=pytest.mark.long)
        for do in (
            computing.compute_in_a_worker_client,
            computing.compute_in_chunks_that_compute,
            computing.secede_and_wait,
            computing.wait_for_results,
        )
    ),
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


@pytest.mark.parametrize("name", ["dask", "local"])
def test_populate_may_be_called_in_a_task(
    lab: ModuleType, server: Server, one_thread: Any, name: str
) -> None:
    pipelines.fill(lab)
    task = one_thread.submit(computing.populate_in_a_task, lab.__name__, server, name, pure=False)
    assert task.result(SECONDS) == {"success_count": 6, "error_list": []}


@pytest.mark.long
def test_a_run_says_that_it_waits_for_a_worker_that_has_what_a_key_needs(
    lab: ModuleType, one_thread: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipelines.fill(lab)
    executor = djdist.DaskExecutor(one_thread, resources={"gpu": 1})

    added: list[subprocess.Popen[bytes]] = []

    def add_a_worker_that_has_it() -> None:
        wait_until(lambda: "A key of Logged needs" in caplog.text, "the warning")
        command = [sys.executable, "-m", "dask", "worker", one_thread.scheduler.address, "--no-dashboard"]
        added.append(subprocess.Popen([*command, "--nthreads=1", "--resources=gpu=1"]))

    try:
        with meanwhile(add_a_worker_that_has_it):
            assert lab.Logged.populate(reserve_jobs=True, executor=executor)["success_count"] == 6
    finally:
        for worker in added:
            worker.terminate()
            worker.wait(SECONDS)
    assert len(set(lab.Logged().to_arrays("pid"))) == 1
    (warning,) = (record.getMessage() for record in caplog.records if "A key of" in record.message)
    assert "A key of Logged needs 1 CPU, 1 gpu, which no node" in warning
