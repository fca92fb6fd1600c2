"""Runs whose driver or caller goes away for a while, and workers that are no good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from lab import doing
from lab.watching import SECONDS, counts, meanwhile, wait_until

CALL = """
from {lab} import Scripted
from lab import doing

make_kwargs = {{"do": doing.wait_at_gate, "folder": {folder!r}}}
print(Scripted.populate(reserve_jobs=True, executor={executor!r}, make_kwargs=make_kwargs))
"""


class TestCallerAway:
    @pytest.mark.long_on("ray")
    @pytest.mark.parametrize("executor", ["ray", "dask"])
    @pytest.mark.long
    def test_its_run_goes_on_when_it_is_back(
        self,
        request: pytest.FixtureRequest,
        lab: ModuleType,
        script: Callable[..., Any],
        tmp_path: Path,
        executor: str,
    ) -> None:
        pipelines.fill(lab)
        code = CALL.format(lab=lab.__name__, folder=str(tmp_path), executor=executor)
        lease = {"DJDIST_LEASE_SECONDS": "3", "DJDIST_GRACE_SECONDS": "0"}  # a busy machine delays a caller
        process = script(code, **lease, **address_of(request, executor))
        wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: counts(lab.Scripted) == {"pending": 6}, "the run to stop")
        doing.open_gate(tmp_path)
        process.send_signal(signal.SIGCONT)
        output, error = process.communicate(timeout=SECONDS)
        assert "'success_count': 6" in output, error
        assert counts(lab.Scripted) == {}


def address_of(request: pytest.FixtureRequest, executor: str) -> dict[str, str]:
    if executor == "ray":
        ray = request.getfixturevalue("ray_cluster")
        return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return {"DASK_SCHEDULER_ADDRESS": request.getfixturevalue("dask_client").scheduler.address}


@pytest.fixture
def one_worker(modules_folder: Path, tmp_path: Path) -> Iterator[Any]:
    """A client of a Dask cluster that soon gives up its only worker, which has to hold the driver as well."""
    import dask
    import distributed

    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}),
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=":0", local_directory=tmp_path
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.mark.on("dask")
class TestDriverBesideTheKeys:
    @pytest.mark.long
    def test_a_key_that_kills_it_is_the_only_error(
        self, lab: ModuleType, one_worker: Any, tmp_path: Path
    ) -> None:
        pipelines.fill(lab, subjects=1)
        arguments = {"do": doing.die_at_the_first, "folder": str(tmp_path)}
        options = {"reserve_jobs": True, "suppress_errors": True, "make_kwargs": arguments}
        summary = lab.Scripted.populate(executor=one_worker, **options)
        assert len(lab.Scripted()) == 2
        assert counts(lab.Scripted) == {"error": 1}
        (job,) = lab.Scripted.jobs.errors.to_dicts()
        assert "lost 3 times" in job["error_message"]
        assert [key["session_date"] for key, _ in summary["error_list"]] == [pipelines.FIRST_DATE]
        assert doing.begun(tmp_path).count(1) == djdist.config.max_worker_losses

    @pytest.mark.long
    def test_keys_that_never_end_are_ended_however_many(
        self, lab: ModuleType, one_worker: Any, tmp_path: Path
    ) -> None:
        pipelines.fill(lab, subjects=1, sessions=5)
        arguments = {"do": doing.never_end_before_the_last, "folder": str(tmp_path), "last": 5}
        options = {"reserve_jobs": True, "suppress_errors": True, "make_kwargs": arguments}
        lab.Scripted.populate(executor=one_worker, timeout_seconds=3, **options)
        assert len(lab.Scripted()) == 1
        errors = lab.Scripted.jobs.errors.to_dicts()
        assert [job["error_message"] for job in errors] == ["TimeoutError: timed out after 3 seconds"] * 4


@pytest.mark.long
@pytest.mark.on("dask")
def test_a_worker_that_can_not_load_the_pipeline_costs_no_key(
    lab: ModuleType, one_worker: Any, tmp_path: Path
) -> None:
    pipelines.fill(lab, subjects=2, sessions=20)
    arguments = {"do": doing.wait_at_gate_and_take_a_while, "folder": str(tmp_path)}
    started: list[subprocess.Popen[bytes]] = []

    def add_a_bad_worker() -> None:
        wait_until(lambda: doing.begun(tmp_path), "a job")
        started.append(start_worker(one_worker.scheduler.address, tmp_path))
        one_worker.wait_for_workers(2)
        doing.open_gate(tmp_path)

    with meanwhile(add_a_bad_worker):
        summary = lab.Scripted.populate(reserve_jobs=True, executor=one_worker, make_kwargs=arguments)
    for worker in started:
        worker.terminate()
        worker.wait()
    assert summary == {"success_count": 40, "error_list": []}
    assert counts(lab.Scripted) == {}


def start_worker(scheduler: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a Dask worker that can import djdist, but not the tests' modules."""
    package = str(Path(djdist.__file__).parents[1])
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler]
    options = ["--nthreads=1", "--no-nanny", "--no-dashboard", f"--local-directory={folder / 'bad'}"]
    environment = {**os.environ, "PYTHONPATH": package}
    return subprocess.Popen([*command, *options], env=environment, cwd=folder)
