"""Runs that go on without their caller, and how they are found again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from lab import doing
from lab.watching import SECONDS, counts, pid_of_ray_actor, wait_until

CALL = """
from {lab} import Scripted
from lab import doing

make_kwargs = {{"do": doing.{do}, "folder": {folder!r}}}
options = {{"reserve_jobs": True, "suppress_errors": True, "make_kwargs": make_kwargs}}
print(Scripted.populate(executor={executor!r}, detach=True, **options).info.id)
"""


@pytest.fixture(params=["ray", "dask"])
def cluster(request: pytest.FixtureRequest) -> tuple[Any, str, dict[str, str]]:
    """A cluster as this process gives it to djdist, its name, and how another process finds it."""
    if request.param == "ray":
        ray = request.getfixturevalue("ray_cluster")
        return "ray", "ray", {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    client = request.getfixturevalue("dask_client")
    return client, "dask", {"DASK_SCHEDULER_ADDRESS": client.scheduler.address}


Detach = Callable[..., djdist.Run]


@pytest.fixture
def detach(
    lab: ModuleType, script: Callable[..., Any], tmp_path: Path, cluster: tuple[Any, str, dict[str, str]]
) -> Detach:
    """Starts a run from a process that ends, and finds it from this one."""
    executor, name, environment = cluster

    def start(do: Any) -> djdist.Run:
        code = CALL.format(lab=lab.__name__, do=do.__name__, folder=str(tmp_path), executor=name)
        long_grace = {"DJDIST_GRACE_SECONDS": str(SECONDS)}
        output, error = script(code, **environment, **long_grace).communicate(timeout=SECONDS)
        (found,) = [run for run in djdist.runs(executor) if run.info.id == output.split()[-1]] or [error]
        assert isinstance(found, djdist.Run), error
        return found

    return start


@pytest.mark.long_on("ray")
def test_it_goes_on_when_its_caller_is_gone(
    lab: ModuleType, detach: Detach, tmp_path: Path, cluster: tuple[Any, str, dict[str, str]]
) -> None:
    pipelines.fill(lab)
    run = detach(doing.wait_at_gate)
    assert (run.info.table, run.info.schema, run.info.detached) == ("Scripted", lab.schema.database, True)
    wait_until(lambda: doing.begun(tmp_path), "a job")
    wait_until(lambda: run.status().pending > 0 and run.status().running > 0, "the counts")
    assert f"Scripted of {lab.schema.database}" in repr(run)
    assert "Scripted" in names_of_drivers(cluster, run)
    with pytest.raises(TimeoutError, match="goes on"):
        run.wait(timeout_seconds=0)
    doing.open_gate(tmp_path)
    for _ in range(2):  # who waited first may have lost it
        assert run.wait() == {"success_count": 6, "error_list": []}
    assert len(lab.Scripted()) == 6
    assert counts(lab.Scripted) == {}


@pytest.mark.long_on("ray")
def test_it_can_be_stopped_from_elsewhere(lab: ModuleType, detach: Detach, tmp_path: Path) -> None:
    pipelines.fill(lab)
    run = detach(doing.wait_at_gate)
    wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
    run.stop()
    wait_until(lambda: counts(lab.Scripted) == {"reserved": 2, "pending": 4}, "the rest to be given back")
    doing.open_gate(tmp_path)
    assert run.wait()["success_count"] == 2
    assert counts(lab.Scripted) == {"pending": 4}


@pytest.mark.long_on("ray")
@pytest.mark.long
def test_its_errors_come_with_its_result(lab: ModuleType, detach: Detach) -> None:
    pipelines.fill(lab)
    summary = detach(doing.fail_the_first_time).wait()
    assert summary["success_count"] == 0
    assert all(message.startswith("ConnectionRefusedError") for _, message in summary["error_list"])
    assert counts(lab.Scripted) == {"error": 6}


@pytest.mark.long
def test_another_driver_adopts_it(
    lab: ModuleType, detach: Detach, tmp_path: Path, cluster: tuple[Any, str, dict[str, str]]
) -> None:
    pipelines.fill(lab)
    run = detach(doing.wait_at_gate)
    wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
    os.kill(pid_of_driver(cluster, run), signal.SIGKILL)
    doing.open_gate(tmp_path)
    assert run.wait()["error_list"] == []
    assert len(lab.Scripted()) == 6
    assert counts(lab.Scripted) == {}


@pytest.mark.long
def test_its_result_stays_when_the_process_of_its_driver_dies_after_the_end(
    lab: ModuleType, detach: Detach, tmp_path: Path, cluster: tuple[Any, str, dict[str, str]]
) -> None:
    pipelines.fill(lab)
    run = detach(doing.wait_at_gate)
    wait_until(lambda: doing.begun(tmp_path), "a job")
    driver = pid_of_driver(cluster, run)
    doing.open_gate(tmp_path)
    wait_until(lambda: run.status().made == 6 and not run.status().running, "the end of the run")
    with suppress(ProcessLookupError):
        os.kill(driver, signal.SIGKILL)
    assert run.wait() == {"success_count": 6, "error_list": []}


def names_of_drivers(cluster: tuple[Any, str, dict[str, str]], run: djdist.Run) -> str:
    """Give what the cluster's pages call the run's driver."""
    client, name, _ = cluster
    if name == "ray":
        from ray.util import list_named_actors

        named = list_named_actors(all_namespaces=True)
        return str([actor["name"] for actor in named if run.info.id in actor["name"]])
    keys = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks))
    return str([key for key in keys if run.info.id == key[-1]])


def pid_of_driver(cluster: tuple[Any, str, dict[str, str]], run: djdist.Run) -> int:
    client, name, _ = cluster
    if name == "ray":
        return pid_of_ray_actor("DriverHost")
    keys = client.run(lambda dask_worker: list(dask_worker.active_threads.values()))
    (address,) = [
        worker for worker, running in keys.items() if any(key[-1] == run.info.id for key in running)
    ]
    found: int = client.run(os.getpid, workers=[address])[address]
    return found


def test_here_it_is_refused_before_any_job_is_touched(lab: ModuleType) -> None:
    pipelines.fill(lab)
    with pytest.raises(djdist.OptionError, match="no cluster that lives longer"):
        lab.Square.populate(reserve_jobs=True, detach=True)
    assert counts(lab.Square) == {}
    with pytest.raises(djdist.OptionError, match="no cluster that lives longer"):
        djdist.runs("local")
