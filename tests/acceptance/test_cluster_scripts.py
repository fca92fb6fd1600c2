"""The scripts of cluster-configs, run on this machine with a pipeline of the tests."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lab as pipelines
from lab.watching import counts
from servers import Server

FOLDER = Path(__file__).parents[2] / "cluster-configs"
SLURM = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": "hostname --ip-address | cut -d ' ' -f 1",
}


@pytest.fixture
def environment(server: Server, lab: ModuleType, modules_folder: Path, tmp_path: Path) -> dict[str, str]:
    """What a lab has set up before: a Python, a pipeline, and a file with the credentials."""
    pipelines.fill(lab)
    (modules_folder / "my_pipeline.py").write_text(f"from {lab.__name__} import Square as ProcessedData\n")
    database = {
        "DJ_BACKEND": server.backend,
        "DJ_DATABASE_NAME": server.database_name or "",
        "DJ_HOST": server.host,
        "DJ_PASS": server.password,
        "DJ_PORT": str(server.port),
        "DJ_USER": server.user,
        "DJ_USE_TLS": "false",
    }
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in database.items() if value)
    (tmp_path / ".datajoint.env").write_text(exports)
    activate = tmp_path / "env" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    return {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Slurm's variables in a job of two nodes, which both are this machine, and its commands."""
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o700)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here,here",
        "SLURM_JOB_NUM_NODES": "2",
    }


@pytest.mark.long
@pytest.mark.on("ray")
def test_ray_starts_over_an_allocation_of_slurm(
    lab: ModuleType, environment: dict[str, str], slurm: dict[str, str]
) -> None:
    command = ["bash", str(FOLDER / "ray" / "slurm.sh"), str(FOLDER / "populate.py")]
    try:
        done = subprocess.run(command, env={**environment, **slurm}, capture_output=True, text=True)
    finally:
        shutil.rmtree(f"/tmp/ray-{slurm['SLURM_JOB_ID']}", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert "6 made, 0 failed" in done.stdout.splitlines()
    assert counts(lab.Square) == {}


@pytest.mark.long
@pytest.mark.on("dask")
def test_dask_starts_on_this_machine(lab: ModuleType, environment: dict[str, str]) -> None:
    command = f". ~/.datajoint.env && exec {sys.executable} {FOLDER / 'dask' / 'local.py'}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(lab.Square()) == 6
    assert counts(lab.Square) == {}
