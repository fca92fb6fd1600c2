"""The scripts of cluster-configs, run on this machine with a pipeline of the tests."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datajoint as dj
import pytest

import lab as pipelines
from conftest import unavailable
from lab.clusters import RayCluster
from lab.hosts import hosts, what_hosts_lack
from lab.relay import relayed
from lab.watching import counts
from servers import Server

FOLDER = Path(__file__).parents[2] / "cluster-configs"
SLURM = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": "hostname --ip-address | cut -d ' ' -f 1",
}

JOBS_OF_SLURM = {
    "sbatch": 'cp "$1" "$1.job"\nsetsid bash "$1.job" &> /dev/null &\necho "Submitted batch job $!"',
    "scancel": 'for job; do kill -- "-$job"; done',
}


def credentials(server: Server) -> dict[str, str]:
    database = {
        "DJ_BACKEND": server.backend,
        "DJ_DATABASE_NAME": server.database_name or "",
        "DJ_HOST": server.host,
        "DJ_PASS": server.password,
        "DJ_PORT": str(server.port),
        "DJ_USER": server.user,
        "DJ_USE_TLS": "false",
    }
    return {name: value for name, value in database.items() if value}


NEEDS_TWO_HOSTS = """
import socket
from pathlib import Path

import datajoint as dj

from {lab} import Session, schema
from lab.watching import wait_until


@schema
class ProcessedData(dj.Computed):
    definition = '''
    -> Session
    ---
    host : varchar(255)
    '''

    def make(self, key):
        begun, host = Path({folder!r}), socket.gethostname()
        (begun / host).touch()
        wait_until(lambda: len(list(begun.iterdir())) == 2, "another host")
        self.insert1({{**key, "host": host}})
"""


@pytest.fixture
def environment(server: Server, lab: ModuleType, modules_folder: Path, tmp_path: Path) -> dict[str, str]:
    """What a lab has set up before: a Python, a pipeline, and a file with the credentials."""
    pipelines.fill(lab)
    (modules_folder / "my_pipeline.py").write_text(f"from {lab.__name__} import Square as ProcessedData\n")
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in credentials(server).items())
    (tmp_path / ".datajoint.env").write_text(exports)
    activate = tmp_path / "env" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    return {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def two_hosts(
    server: Server, lab: ModuleType, modules_folder: Path, environment: dict[str, str], tmp_path: Path
) -> Iterator[list[str]]:
    """The addresses of two hosts, a way from them to the database, and a pipeline that needs both."""
    if lacks := what_hosts_lack():
        unavailable(lacks)
    (tmp_path / "begun").mkdir()
    pipeline = NEEDS_TWO_HOSTS.format(lab=lab.__name__, folder=str(tmp_path / "begun"))
    (modules_folder / "my_pipeline.py").write_text(pipeline)
    given = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    with (
        hosts(tmp_path, 2, given) as (gateway, addresses),
        relayed(server.host, server.port, at=gateway) as relay,
    ):
        with (tmp_path / ".datajoint.env").open("a") as file:
            file.write(f"export DJ_HOST={gateway} DJ_PORT={relay.port}\n")
        yield addresses


def copied(folder: Path, name: str, **replacements: str) -> Path:
    """Copy one of the files with its neighbours and replace what a lab has to replace."""
    shutil.copytree(FOLDER, folder / "cluster-configs")
    file = folder / "cluster-configs" / name
    text = file.read_text()
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return file


def commands(file: Path) -> list[str]:
    """Give the commands at the top of a file."""
    lines = file.read_text().split("\n# Before")[0].splitlines()
    return [line.removeprefix("#   ") for line in lines if line.startswith("#   ")]


def shell(command: str, environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", f". ~/env/bin/activate && . ~/.datajoint.env && {command}"],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


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
    command = ["bash", str(FOLDER / "ray" / "slurm.sh"), str(FOLDER / "populate.py"), "num_cpus=0.5"]
    try:
        done = subprocess.run(command, env={**environment, **slurm}, capture_output=True, text=True)
    finally:
        shutil.rmtree(f"/tmp/ray-{slurm['SLURM_JOB_ID']}", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert "6 made, 0 errors left" in done.stdout.splitlines()
    assert counts(lab.Square) == {}


@pytest.mark.long
@pytest.mark.on("dask")
def test_dask_starts_on_this_machine(lab: ModuleType, environment: dict[str, str]) -> None:
    command = f". ~/.datajoint.env && exec {sys.executable} {FOLDER / 'dask' / 'local.py'}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(lab.Square()) == 6
    assert counts(lab.Square) == {}


@pytest.mark.long
@pytest.mark.on("dask")
def test_dask_starts_its_workers_as_jobs_of_slurm(
    lab: ModuleType, environment: dict[str, str], tmp_path: Path
) -> None:
    for name, script in JOBS_OF_SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o700)
    smaller = {"cores: 8": "cores: 1", "processes: 8": "processes: 1", "32GiB": "1GiB"}
    file = copied(tmp_path, "dask/jobqueue.yaml", **smaller)
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    shell(" && ".join(commands(file)), environment, file.parent)
    assert len(lab.Square()) == 6
    assert counts(lab.Square) == {}


@pytest.mark.long
@pytest.mark.parametrize("server", ["mysql"], indirect=True)
def test_dask_starts_on_hosts_with_ssh(
    lab: ModuleType, environment: dict[str, str], two_hosts: list[str], tmp_path: Path
) -> None:
    head, worker = two_hosts
    file = copied(tmp_path, "dask/ssh.py", **{'"n_workers": 8': '"n_workers": 1'})
    shell(f"python {file.name} {head} {head} {worker}", environment, file.parent)
    made = dj.VirtualModule("made", lab.SCHEMA).ProcessedData
    assert set(made().to_arrays("host")) == {"host1", "host2"}
    assert counts(made) == {}


@pytest.mark.long
@pytest.mark.parametrize("server", ["mysql"], indirect=True)
def test_ray_up_starts_a_cluster_on_hosts_with_ssh(
    lab: ModuleType, environment: dict[str, str], two_hosts: list[str], tmp_path: Path
) -> None:
    head, worker = two_hosts
    of_the_lab = {
        "head_ip: 10.0.0.1": f"head_ip: {head}",
        "[10.0.0.2, 10.0.0.3, 10.0.0.4]": f"[{worker}]",
        "max_workers: 3": "max_workers: 1",
        "ssh_user: lab": "ssh_user: root",
        "~/.ssh/id_ed25519": str(tmp_path / ".ssh" / "id_ed25519"),
        "DJ_HOST=database.example.org ": "",
        "DJ_BACKEND=postgresql": "DJ_BACKEND=mysql",
    }
    file = copied(tmp_path, "ray/on-premises.yaml", **of_the_lab)
    (tmp_path / "my_pipeline").mkdir()
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        environment["RAY_TMPDIR"] = folder
        shell("ray get-auth-token --generate", environment, file.parent)
        up, submit, down = commands(file)
        try:
            shell(f"{up} --yes --no-config-cache", environment, file.parent)
            assert "6 made, 0 errors left" in shell(submit, environment, file.parent)
        finally:
            shell(f"{down} --yes", environment, file.parent)
    made = dj.VirtualModule("made", lab.SCHEMA).ProcessedData
    assert set(made().to_arrays("host")) == {"host1", "host2"}
    assert counts(made) == {}


JOB_PIPELINE = """
import datajoint as dj

from {lab} import schema


@schema
class Trial(dj.Manual):
    definition = '''
    n : int32
    ---
    s : varchar(10)
    '''


@schema
class Table(dj.Computed):
    definition = '''
    -> Trial
    '''

    @property
    def key_source(self):
        return Trial()

    def make(self, key):
        if key["n"] > 3:
            raise ValueError("bad n")
        self.insert1(key)
"""


@pytest.mark.long
@pytest.mark.parametrize("server", ["mysql"], indirect=True)
def test_a_job_of_ray_is_a_call_of_djdist(
    server: Server, lab: ModuleType, modules_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_pipeline.py").write_text(JOB_PIPELINE.format(lab=lab.__name__))
    for name, value in credentials(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")

    def submit(restriction: str) -> subprocess.CompletedProcess[str]:
        job = ["djdist", "populate", "my_pipeline:Table", restriction, "--executor", "ray"]
        return subprocess.run(
            ["ray", "job", "submit", "--working-dir", ".", "--address", cluster.job_server, "--", *job],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        cluster = RayCluster(folder, [2], takes_jobs=True)
        try:
            subprocess.run([sys.executable, "-c", "import my_pipeline"], cwd=tmp_path, check=True)
            made = dj.VirtualModule("made", lab.SCHEMA)
            made.Trial.insert([(1, "ab"), (2, "b"), (3, "abc"), (4, "xyz")])
            done = submit('n < 3 AND s LIKE "a%"')
            assert done.returncode == 0, done.stdout + done.stderr
            assert "1 made, 0 errors left" in done.stdout
            assert made.Table().keys() == [{"n": 1}]
            done = submit("n = 4")
            assert done.returncode == 1, done.stdout + done.stderr
            assert "0 made, 1 error left" in done.stdout
        finally:
            cluster.close()
