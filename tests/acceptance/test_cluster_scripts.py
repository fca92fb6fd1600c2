"""The scripts of cluster-configs, run on this machine with a pipeline of the tests."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import datajoint as dj
import distributed
import pytest
import yaml

import lab as pipelines
from conftest import unavailable
from lab.clusters import RayCluster
from lab.hosts import hosts, what_hosts_lack
from lab.relay import relayed
from lab.slurm import slurm as running_slurm
from lab.slurm import what_slurm_lacks
from lab.watching import counts, wait_until
from servers import Server, free_port

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parents[2] / "cluster-configs"
SLOW_SECONDS = 400
"""One machine is all hosts, each with a Ray."""


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
import os
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
        begun, host = Path({folder!r}), f"{{socket.gethostname()}} {{os.environ['LAB_FILE']}}"
        host += os.environ.get("SLURM_JOB_ID", "")
        (begun / host).touch()
        wait_for = int(os.environ.get("LAB_HOSTS", 2))
        wait_until(lambda: len(list(begun.iterdir())) == wait_for, "another host", {seconds})
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
    return {
        **os.environ,
        "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True",
        "HOME": str(tmp_path),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture
def two_hosts(
    server: Server, lab: ModuleType, modules_folder: Path, environment: dict[str, str], tmp_path: Path
) -> Iterator[list[str]]:
    """The addresses of two hosts, a way from them to the database, and a pipeline that needs both."""
    if lacks := what_hosts_lack():
        unavailable(lacks)
    (tmp_path / "begun").mkdir()
    pipeline = NEEDS_TWO_HOSTS.format(lab=lab.__name__, folder=str(tmp_path / "begun"), seconds=SLOW_SECONDS)
    (modules_folder / "my_pipeline.py").write_text(pipeline)
    given = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    with (
        hosts(tmp_path, 2, given) as (gateway, addresses),
        relayed(server.host, server.port, at=gateway) as relay,
    ):
        with (tmp_path / ".datajoint.env").open("a") as file:
            file.write(f"export DJ_HOST={gateway} DJ_PORT={relay.port} LAB_FILE='sourced '\n")
        for name in ("host1", "host2"):
            shutil.copy(tmp_path / ".datajoint.env", tmp_path / name)
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


def command(file: Path, program: str) -> str:
    """Give the command of the page that calls a program."""
    (line,) = re.findall(rf"#   (.*\b{program}\b.*)", file.read_text())
    return str(line)


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


def gateway_of(hosts: list[str]) -> str:
    return hosts[0].rpartition(".")[0] + ".254"


@pytest.fixture
def slurm(two_hosts: list[str], environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """Give the environment of a login node of Slurm, whose nodes are the two hosts."""
    if lacks := what_slurm_lacks():
        unavailable(lacks)
    nodes = {f"host{number}": address for number, address in enumerate(two_hosts, 1)}
    with running_slurm(tmp_path / "slurm", gateway_of(two_hosts), nodes) as given:
        yield {**environment, **given}


@pytest.mark.long
@pytest.mark.parametrize("server", ["mysql"], indirect=True)
def test_ray_starts_over_allocations_of_slurm_that_share_a_node(
    lab: ModuleType, slurm: dict[str, str], tmp_path: Path
) -> None:
    file = copied(tmp_path, "ray/slurm.sh")
    shell(command(file, "get-auth-token"), slurm, file.parent)
    submit, _, _ = commands(file)

    def submitted(nodes: int, waits_for: int, begun: int) -> str:
        options = f"--nodes={nodes} --cpus-per-task=1 --nodelist=host[1-{nodes}] --parsable --output=%j.out"
        environment = {**slurm, "LAB_HOSTS": str(waits_for)}
        job = shell(submit.replace("--nodes=4", options), environment, file.parent).strip()
        wait_until(lambda: len(list((tmp_path / "begun").iterdir())) == begun, "keys", SLOW_SECONDS)
        return job

    whole = submitted(nodes=2, waits_for=3, begun=2)
    cancelled = submitted(nodes=1, waits_for=9, begun=3)
    shell(f"scancel {cancelled}", slurm, tmp_path)
    wait_until(lambda: not shell("squeue --noheader", slurm, tmp_path), "the end of both", SLOW_SECONDS)
    output = (file.parent / f"{whole}.out").read_text()
    assert "0 errors left" in output
    made = dj.VirtualModule("made", lab.SCHEMA).ProcessedData()
    assert set(made.to_arrays("host")) == {f"host1 sourced {whole}", f"host2 sourced {whole}"}, output
    assert not [job for job in (whole, cancelled) if Path(f"/tmp/ray-{job}").exists()]


SERVICE = """#!/bin/bash
echo "$*" > {folder}/call-$SLURM_JOB_ID
[ -e {folder}/idle ] && exit
trap 'exit 143' TERM
sleep infinity & wait
"""


@pytest.mark.long
@pytest.mark.parametrize("server", ["mysql"], indirect=True)
def test_a_service_on_slurm_renews_itself_until_it_is_cancelled_or_idle(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    """It shows the script alone: how djdist watches and ends has tests of its own."""
    shortest = {"08:00:00": "00:01:00", "TERM@300": "TERM@30", "cpus-per-task=16": "cpus-per-task=1"}
    file = copied(tmp_path, "service/slurm.sh", **shortest)
    program = tmp_path / "env" / "bin" / "djdist"
    program.write_text(SERVICE.format(folder=tmp_path))
    program.chmod(0o755)
    with (tmp_path / "env" / "bin" / "activate").open("a") as activate:
        activate.write(f"PATH={program.parent}:$PATH\n")
    submit, queue, cancel = (line.partition("   #")[0] for line in commands(file))

    def calls() -> list[str]:
        return [call.read_text() for call in tmp_path.glob("call-*")]

    def is_over() -> bool:
        return not shell(f"{queue} --noheader", slurm, tmp_path)

    shell(submit, slurm, file.parent)
    wait_until(lambda: len(calls()) == 2, "the second job", SLOW_SECONDS)
    assert set(calls()) == {"populate my_pipeline --watch --executor local --processes 0\n"}
    shell(cancel, slurm, tmp_path)
    wait_until(is_over, "the end of it and of its next job", SLOW_SECONDS)
    (tmp_path / "idle").touch()
    shell(submit, slurm, file.parent)
    wait_until(lambda: len(calls()) == 3 and is_over(), "its end when it is idle", SLOW_SECONDS)


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
def test_the_operator_of_kubernetes_scales_a_dask_cluster_that_has_a_key(
    lab: ModuleType, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, dashboard = free_port(), free_port()
    places = {"/run/dask": str(tmp_path), "djdist-scheduler:8786": f"127.0.0.1:{port}", ":8786": f":{port}"}
    file = copied(tmp_path, "dask/kubernetes.yaml", **places)
    shell(command(file, "openssl"), environment, tmp_path)
    for name in ("key", "crt"):
        (tmp_path / f"dask.{name}").rename(tmp_path / f"tls.{name}")
    cluster, _, config, _ = yaml.safe_load_all(file.read_text())
    (tmp_path / "dask.yaml").write_text(config["data"]["dask.yaml"])
    environment |= {"DASK_CONFIG": str(tmp_path / "dask.yaml"), "DASK_WORKER_NAME": "worker"}
    options = f"--host 127.0.0.1 --port {port} --dashboard-address 127.0.0.1:{dashboard}"
    scheduler = _in_pod(cluster["spec"]["scheduler"], options, environment)
    workers = [
        _in_pod(cluster["spec"]["worker"], "--host 127.0.0.1", {**environment, "DASK_WORKER_NAME": name})
        for name in ("a", "b")
    ]
    controller = importlib.import_module("dask_kubernetes.operator.controller.controller")

    async def address(*_: Any, port_name: str = "tcp-comm", **__: Any) -> str:
        return f"tcp://127.0.0.1:{dashboard if port_name == 'http-dashboard' else port}"

    def retired() -> bool:
        group = (1, "djdist-scheduler", "djdist-default", "default", logger)
        with suppress(aiohttp.ClientError):  # its dashboard isn't there yet
            return len(asyncio.run(controller.retire_workers(*group))) == 1
        return False

    monkeypatch.setattr(controller, "get_scheduler_address", address)
    try:
        wait_until(retired, "a worker that the operator retires")
        assert asyncio.run(controller.get_desired_workers("djdist-scheduler", "default")) == 0
        environment |= {"DASK_SCHEDULER_ADDRESS": f"tls://localhost:{port}", "DJDIST_EXECUTOR": "dask"}
        assert "6 made, 0 errors left" in shell("python ../populate.py", environment, file.parent)
        with pytest.raises(OSError, match=r"Timed out|closed"):
            distributed.Client(f"tcp://127.0.0.1:{port}", timeout=3)
    finally:
        for process in (*workers, scheduler):
            process.terminate()
            process.wait()


def _in_pod(part: dict[str, Any], options: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start what a pod would."""
    (container,) = part["spec"]["containers"]
    given = {env["name"]: env["value"] for env in container["env"] if env["name"].startswith("DASK")}
    words = [environment["DASK_WORKER_NAME"] if "$" in word else word for word in container["args"]]
    activated = f'. ~/env/bin/activate && . ~/.datajoint.env && exec "$@" {options}'
    return subprocess.Popen(["bash", "-c", activated, "pod", *words], env={**environment, **given})


@pytest.mark.long
@pytest.mark.parametrize("server", ["mysql"], indirect=True)
def test_dask_starts_its_workers_as_jobs_of_slurm(
    lab: ModuleType, two_hosts: list[str], slurm: dict[str, str], tmp_path: Path
) -> None:
    here = f"scheduler-options: {{host: {gateway_of(two_hosts)}}}"
    of_the_lab = {
        "cores: 8": "cores: 1",
        "processes: 8": "processes: 1",
        "memory: 32GiB": "memory: 1GiB",
        "# interface: ib0": f"{here}  #",
        "job-extra-directives: []": "job-extra-directives: [--exclusive]",
    }
    file = copied(tmp_path, "dask/jobqueue.yaml", **of_the_lab)
    shell(" && ".join(commands(file)), slurm, file.parent)
    made = dj.VirtualModule("made", lab.SCHEMA).ProcessedData()
    assert {host.split()[0] for host in made.to_arrays("host")} == {"host1", "host2"}
    assert counts(type(made)) == {}
    assert not list(tmp_path.glob(".dask-jobqueue*"))


@pytest.mark.long
@pytest.mark.parametrize("server", ["mysql"], indirect=True)
def test_dask_starts_on_hosts_with_ssh(
    lab: ModuleType, environment: dict[str, str], two_hosts: list[str], tmp_path: Path
) -> None:
    head, worker = two_hosts
    file = copied(tmp_path, "dask/ssh.py", **{'"n_workers": 8': '"n_workers": 1'})
    shell(command(file, "openssl"), environment, tmp_path)
    shell(f"python {file.name} {head} {head} {worker}", environment, file.parent)
    made = dj.VirtualModule("made", lab.SCHEMA).ProcessedData
    assert set(made().to_arrays("host")) == {"host1 sourced ", "host2 sourced "}
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
    assert set(made().to_arrays("host")) == {"host1 sourced ", "host2 sourced "}
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
