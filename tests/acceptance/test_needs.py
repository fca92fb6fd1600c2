"""What keys need of a cluster: GPUs, and what no node has."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import djdist
from djdist._needs import Needs
from djdist.errors import OptionError
from lab import doing, fill
from lab.watching import counts, meanwhile, pid_of_ray_actor, wait_until

pytestmark = pytest.mark.on("ray")


@pytest.mark.long
def test_on_ray_each_gpu_keeps_its_process_for_the_run(
    lab: ModuleType, ray_cluster: Any, tmp_path: Path
) -> None:
    fill(lab, subjects=2, sessions=10)
    run = {"reserve_jobs": True, "make_kwargs": {"do": doing.load_model, "folder": str(tmp_path)}}
    with djdist.RayExecutor(num_gpus=1, num_cpus=0) as executor:
        assert lab.Scripted.populate(max_calls=10, executor=executor, **run)["success_count"] == 10
        first = doing.models(tmp_path)
        assert {*lab.Scripted().to_arrays("pid")} == {*first}
        wait_until(lambda: not any(map(psutil.pid_exists, first)), "the processes to end with the run")
        assert lab.Scripted.populate(executor=executor, **run)["success_count"] == 10
    models = doing.models(tmp_path)
    assert {*models.values()} == {1}
    assert 1 <= len(first) <= 2
    assert 1 <= len(models.keys() - first) <= 2


@pytest.mark.long
def test_on_ray_what_a_lost_driver_had_on_a_gpu_ends(
    lab: ModuleType, ray_cluster: Any, tmp_path: Path
) -> None:
    def lose_driver() -> None:
        wait_until(lambda: len(doing.begun(tmp_path)) == 2, "a key on each GPU")
        first = doing.models(tmp_path)
        os.kill(pid_of_ray_actor("DriverHost"), signal.SIGKILL)
        wait_until(lambda: not any(map(psutil.pid_exists, first)), "its processes to end")
        doing.open_gate(tmp_path)

    fill(lab, subjects=1, sessions=4)
    make_kwargs = {"do": doing.load_model_and_wait_at_gate, "folder": str(tmp_path)}
    with meanwhile(lose_driver):
        executor = djdist.RayExecutor(num_gpus=1, num_cpus=0)
        lab.Scripted.populate(reserve_jobs=True, executor=executor, make_kwargs=make_kwargs)
    assert len(lab.Scripted()) == 4
    assert counts(lab.Scripted) == {}
    wait_until(lambda: not any(map(psutil.pid_exists, doing.models(tmp_path))), "all processes to end")


def test_on_ray_what_no_node_has_is_said_and_waited_for(
    lab: ModuleType, ray_cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def stop() -> None:
        wait_until(lambda: "It waits for a node that has it" in caplog.text, "a warning")
        (run,) = [run for run in djdist.runs("ray") if run.info.schema == lab.Square.database]
        run.stop()

    fill(lab, subjects=1, sessions=2)
    executor = djdist.RayExecutor(num_gpus=1, memory=1e15, resources={"camera": 0.5})
    with meanwhile(stop):
        assert lab.Square.populate(reserve_jobs=True, executor=executor)["success_count"] == 0
    (warning,) = [r.getMessage() for r in caplog.records if "waits for a node" in r.getMessage()]
    assert "A key of Square needs 1 CPU, 1 GPU, 9.31e+05 GiB memory, 0.5 camera, which no node" in warning
    assert "there are 1 with 2 CPUs, 2 GPUs, " in warning
    assert "GiB memory, 0 camera. It waits" in warning
    assert counts(lab.Square) == {"pending": 2}


@pytest.mark.parametrize("processes", [1, 2])
def test_what_this_machine_lacks_is_refused_before_a_job_is_touched(
    lab: ModuleType, modules_folder: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(lab, subjects=1, sessions=2)
    executor = djdist.LocalExecutor(processes, gpus=0)
    monkeypatch.setattr(executor, "needs", Needs(gpus=1))
    with pytest.raises(OptionError, match="A key of Square needs 1 CPU, 1 GPU, which this machine"):
        lab.Square.populate(reserve_jobs=True, executor=executor)
    assert counts(lab.Square) == {}
