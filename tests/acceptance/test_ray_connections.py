"""How callers come to a Ray cluster, and how their code comes along."""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import djdist
import lab as pipelines
from lab import doing
from lab.watching import SECONDS, counts, wait_until
from servers import Server, free_port

pytestmark = pytest.mark.on("ray")

Script = Callable[..., Any]


@pytest.fixture(scope="module")
def client_address(ray_cluster: Any) -> str:
    """Where Ray Client finds the cluster, whose workers then know no folder of the caller."""
    node = ray_cluster._private.worker._global_node
    node._ray_params.ray_client_server_port = port = free_port()
    node.start_ray_client_server()
    wait_until(lambda: listens(node.node_ip_address, port), "Ray Client's server")
    return f"ray://{node.node_ip_address}:{port}"


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def said(process: Any) -> list[str]:
    output, error = process.communicate(timeout=2 * SECONDS)
    assert process.returncode == 0, output + error
    return [line for line in output.splitlines() if line.startswith("- ")]


CURES = """
import platform, re
from my_pipeline import Doubled

platform.node = lambda: "laptop"  # whose folders the cluster's machine doesn't have

def populate(*restrictions, **options):
    return Doubled.populate(*restrictions, reserve_jobs=True, **options)

try:
    populate(executor="ray")
except djdist.WorkerSetupError as error:
    (cure,) = re.findall(r"RayExecutor\\(.+?\\)", str(error))
print("-", cure)
import ray
assert not ray.is_initialized()

executor = eval("djdist." + cure)
print("-", populate("n < 3", executor=executor))
print("-", populate("n < 5", executor=executor, detach=True).wait())
ray.shutdown()

ray.init(log_to_driver=False)
try:
    populate(executor=eval("djdist." + cure))
except djdist.OptionError as error:
    (cure,) = re.findall(r"runtime_env=({.+?})", str(error))
print("-", cure)
ray.shutdown()

ray.init(log_to_driver=False, runtime_env=eval(cure))
print("-", populate(executor="ray"))
"""

MY_PIPELINE = """
import datajoint as dj
from {lab} import schema, Session


@schema
class Doubled(dj.Computed):
    definition = "-> Session\\n---\\nresult : int64"
    key_source = property(lambda self: Session())

    def make(self, key):
        self.insert1({{**key, "result": 2 * (Session & key).fetch1("n")}})
"""


@pytest.mark.long
def test_over_ray_client_each_cure_that_a_message_names_sends_the_code(
    lab: ModuleType, script: Script, client_address: str, tmp_path: Path
) -> None:
    pipelines.fill(lab, subjects=2, sessions=3)
    (tmp_path / "my_pipeline.py").write_text(MY_PIPELINE.format(lab=lab.__name__))
    assert said(script(CURES, RAY_ADDRESS=client_address)) == [
        '- RayExecutor(runtime_env={"working_dir": "."})',
        "- {'success_count': 2, 'error_list': []}",
        "- {'success_count': 2, 'error_list': []}",
        "- {'working_dir': '.'}",
        "- {'success_count': 2, 'error_list': []}",
    ]


THREADS = """
import threading
from {lab} import Square, Reading

def populate(table):
    print("-", table.__name__, table.populate(reserve_jobs=True, executor="ray")["success_count"], flush=True)

threads = [threading.Thread(target=populate, args=(table,)) for table in (Square, Reading)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()

import ray
print("-", ray.is_initialized())
"""


@pytest.mark.long
def test_threads_may_join_ray_at_once(lab: ModuleType, script: Script, ray_cluster: Any) -> None:
    pipelines.fill(lab, subjects=2, sessions=3)
    lines = said(
        script(THREADS.format(lab=lab.__name__), RAY_ADDRESS=ray_cluster.get_runtime_context().gcs_address)
    )
    assert sorted(lines) == ["- False", "- Reading 6", "- Square 6"]


CALL = """
from {lab} import Scripted
from lab import doing

make_kwargs = {{"do": doing.wait_at_gate, "folder": {folder!r}}}
print("-", Scripted.populate(reserve_jobs=True, executor="ray", make_kwargs=make_kwargs))
"""
INTRUDER = """
import os, pwd, sys
from ray._raylet import GcsClient

nobody = pwd.getpwnam("nobody")  # who may be unable to read the libraries
os.setgroups([])
os.setgid(nobody.pw_gid)
os.setuid(nobody.pw_uid)
os.environ["HOME"] = "/"
try:
    print("in", GcsClient(address=sys.argv[1]).internal_kv_keys(b""))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to run a process as another user")
@pytest.mark.long
def test_nobody_else_gets_into_a_ray_that_djdist_starts(
    lab: ModuleType, script: Script, tmp_path: Path
) -> None:
    home, ray_folder = tmp_path / "home", tempfile.mkdtemp(prefix="ray-")
    home.mkdir()
    pipelines.fill(lab, subjects=1, sessions=1)
    code = CALL.format(lab=lab.__name__, folder=str(tmp_path))
    caller = script(code, HOME=str(home), RAY_TMPDIR=ray_folder, RAY_agent_register_timeout_ms="30000")
    wait_until(lambda: doing.begun(tmp_path) or caller.poll() is not None, "a key")
    words = [word for p in psutil.Process(caller.pid).children(recursive=True) for word in p.cmdline()]
    address = next(word.partition("=")[2] for word in words if word.startswith("--gcs-address="))
    no_token = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    intruder = [sys.executable, "-c", INTRUDER, address]
    intruded = subprocess.run(intruder, capture_output=True, text=True, timeout=SECONDS, env=no_token)
    assert intruded.stdout.startswith("AuthenticationError"), intruded.stdout + intruded.stderr
    (token,) = (home / ".ray").iterdir()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    doing.open_gate(tmp_path)
    assert said(caller) == ["- {'success_count': 1, 'error_list': []}"]
    shutil.rmtree(ray_folder, ignore_errors=True)


def populate_here(server: Server, module: str) -> Any:
    """Populate in a process of Ray's."""
    connection = server.configure()
    djdist.enable()
    try:
        return importlib.import_module(module).Square.populate(reserve_jobs=True, executor="ray")
    finally:
        djdist.disable()
        connection.close()


class Actor:
    def call(self, *arguments: Any) -> Any:
        return populate_here(*arguments)


class AsyncActor:
    async def call(self, *arguments: Any) -> Any:
        return populate_here(*arguments)


class AwaitingActor:
    async def call(self, *arguments: Any) -> Any:
        return await asyncio.to_thread(populate_here, *arguments)


CALLERS = {
    "task": lambda ray: ray.remote(num_cpus=0)(populate_here),
    "actor": lambda ray: ray.remote(num_cpus=0)(Actor).remote().call,
    "threaded actor": lambda ray: ray.remote(num_cpus=0, max_concurrency=2)(Actor).remote().call,
    "async actor": lambda ray: ray.remote(num_cpus=0)(AsyncActor).remote().call,
    "thread of an async actor": lambda ray: ray.remote(num_cpus=0)(AwaitingActor).remote().call,
}


SHORT = {"task"}


@pytest.mark.parametrize(
    "caller",
    [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in CALLERS],
)
def test_populate_may_be_called_in_what_ray_runs(
    lab: ModuleType, ray_cluster: Any, server: Server, caller: str
) -> None:
    pipelines.fill(lab, subjects=2, sessions=3)
    call = CALLERS[caller](ray_cluster)
    summary = ray_cluster.get(call.remote(server, lab.__name__), timeout=SECONDS)
    assert summary == {"success_count": 6, "error_list": []}
    assert len(lab.Square()) == 6
    assert counts(lab.Square) == {}
