"""Clusters that grow from nothing with the work and shrink again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from lab import autoscaling, doing
from lab.watching import SECONDS, counts, meanwhile, wait_until

ON_RAY = """
import ray
from {lab} import Scripted
from lab import doing
from lab.watching import wait_until
from pathlib import Path

folder = Path({folder!r})

def size():
    status = run.status()
    return sum(node["Alive"] for node in ray.nodes()) - 1, status.running + status.queued

ray.init(log_to_driver=False)
make_kwargs = {{"do": doing.wait_at_own_gate, "folder": str(folder)}}
run = Scripted.populate(reserve_jobs=True, executor="ray", detach=True, make_kwargs=make_kwargs)
wait_until(lambda: size() == (3, 4), "three workers, with one task more than they can run")
doing.open_own_gates(folder, range(1, 8))
wait_until(lambda: size() == (1, 1), "two workers to go before the run ends")
doing.open_own_gates(folder, [8])
print(run.wait())
wait_until(lambda: size()[0] == 0, "the last worker to go")
"""


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.on("ray")
def test_a_ray_cluster_grows_and_shrinks(lab: ModuleType, script: Callable[..., Any], tmp_path: Path) -> None:
    pipelines.fill(lab, subjects=2, sessions=4)
    with autoscaling.autoscaling_ray(workers=3) as environment:
        code = ON_RAY.format(lab=lab.__name__, folder=str(tmp_path))
        output, error = script(code, **environment).communicate(timeout=4 * SECONDS)
    assert "{'success_count': 8, 'error_list': []}" in output.splitlines(), error
    assert doing.begun(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(lab.Scripted()) == 8
    assert counts(lab.Scripted) == {}


@pytest.fixture
def adaptive(modules_folder: Path, tmp_path: Path) -> Iterator[Any]:
    """A client of a Dask cluster that has from none to three workers."""
    import distributed

    options = {"dashboard_address": ":0", "local_directory": tmp_path / "dask"}
    with (
        distributed.LocalCluster(n_workers=0, threads_per_worker=1, **options) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        cluster.adapt(maximum=3, target_duration="100ms", interval="200ms")
        yield client


@pytest.mark.long
@pytest.mark.on("dask")
def test_a_dask_cluster_adapts(lab: ModuleType, adaptive: Any, tmp_path: Path) -> None:
    pipelines.fill(lab, subjects=2, sessions=4)

    def size() -> tuple[int, ...]:
        try:
            statuses = [run.status() for run in djdist.runs(adaptive)]
            return len(adaptive.nthreads()), *(status.running + status.queued for status in statuses)
        except djdist.errors.DriverLostError:  # until another one goes on
            return ()

    def watch() -> None:
        wait_until(lambda: size() == (3, 4), "three workers, with one task more than they can run")
        doing.open_own_gates(tmp_path, range(1, 8))
        wait_until(lambda: size() in {(1, 1), (2, 1)}, "a worker to go before the run ends")
        doing.open_own_gates(tmp_path, [8])

    make_kwargs = {"do": doing.wait_at_own_gate, "folder": str(tmp_path)}
    with meanwhile(watch):
        result = lab.Scripted.populate(reserve_jobs=True, executor=adaptive, make_kwargs=make_kwargs)
    assert result["error_list"] == []  # and the driver, if Dask took its worker, may have counted less
    assert len(lab.Scripted()) == 8
    assert counts(lab.Scripted) == {}
    wait_until(lambda: len(adaptive.nthreads()) < 2, "the cluster to shrink")
