"""Where runs take place: clusters of the test's own, whose processes may be hit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from lab.watching import wait_until
from servers import free_port


class Here:
    """This machine without a cluster: the caller drives, in its process or in two more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.options = {"local": "executor='local'", "processes": "processes=2"}[name]
        self.environment: dict[str, str] = {}

    def driver(self, caller: int) -> int | None:
        return caller

    def lose_node(self, chance: random.Random) -> None:
        raise NotImplementedError


class RayCluster:
    """Nodes with so many CPUs each; the first one is the head."""

    name = "ray"
    options = "executor='ray'"

    def __init__(self, folder: str, cpus: Sequence[int], takes_jobs: bool = False) -> None:
        from ray._common.utils import get_ray_address_file, reset_ray_address
        from ray.cluster_utils import Cluster

        os.environ.setdefault("RAY_agent_register_timeout_ms", "30000")  # or none starts on a busy machine
        node: dict[str, Any] = {"num_cpus": cpus[-1], "object_store_memory": 100_000_000}
        head = {**node, "num_cpus": cpus[0], "include_dashboard": takes_jobs, "temp_dir": folder}
        head["dashboard_port"] = port = free_port()
        head["dashboard_agent_listen_port"] = free_port()  # Ray's default is taken where another cluster is
        Path(get_ray_address_file(None)).parent.mkdir(exist_ok=True)  # Ray writes it whatever temp_dir is
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        reset_ray_address()  # or a call that names no cluster would join this one
        self._node = node
        for number in cpus[1:]:
            self._cluster.add_node(**{**node, "num_cpus": number})
        self.environment = {"RAY_ADDRESS": self._cluster.address, "RAY_USAGE_STATS_ENABLED": "0"}
        self.job_server = f"http://127.0.0.1:{port}"
        if takes_jobs:
            wait_until(lambda: _takes_a_job(self.job_server), "an agent that takes jobs")

    def driver(self, caller: int) -> int | None:
        workers = _raylet(self._cluster.head_node).children(recursive=True)
        drivers = [worker for worker in workers if _title(worker).startswith("ray::DriverHost")]
        return max(drivers, key=psutil.Process.create_time).pid if drivers else None

    def lose_node(self, chance: random.Random) -> None:
        """Kill the raylet of a node that is not the head, and give the cluster another node."""
        (node,) = self._cluster.worker_nodes
        _raylet(node).kill()
        self._cluster.remove_node(node, allow_graceful=False)
        self._cluster.add_node(**self._node)

    def close(self) -> None:
        self._cluster.shutdown()


def _takes_a_job(address: str) -> bool:
    from ray.job_submission import JobSubmissionClient

    with suppress(RuntimeError):
        JobSubmissionClient(address).submit_job(entrypoint="true")
        return True
    return False


class DaskCluster:
    """A scheduler and workers of one thread, each with its nanny, as one starts them by hand."""

    name = "dask"
    options = "executor='dask'"

    def __init__(self, folder: str, workers: int) -> None:
        import distributed

        self._folder = Path(folder)
        file = self._folder / "scheduler.json"
        self._scheduler = self._run("scheduler", "--port=0", "--no-dashboard", f"--scheduler-file={file}")
        wait_until(lambda: file.exists() and file.read_text().endswith("}"), "the scheduler")
        self._client = distributed.Client(scheduler_file=str(file), set_as_default=False)
        self.environment = {"DASK_SCHEDULER_ADDRESS": json.loads(file.read_text())["address"]}
        self._nannies = [self._add_worker() for _ in range(workers)]
        self._client.wait_for_workers(workers)

    def driver(self, caller: int) -> int | None:
        who_has: dict[Any, Sequence[str]] = self._client.who_has()
        workers = [holders[0] for key, holders in who_has.items() if "djdist driver" in str(key) and holders]
        pids: dict[str, int] = (
            self._client.run(os.getpid, workers=workers, on_error="ignore") if workers else {}
        )
        return next(iter(pids.values()), None)

    def lose_node(self, chance: random.Random) -> None:
        """Kill a worker with its nanny, so that nothing restarts it, and give the cluster another one."""
        nanny = self._nannies.pop(chance.randrange(len(self._nannies)))
        workers = psutil.Process(nanny.pid).children(recursive=True)
        nanny.kill()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        nanny.wait()
        self._nannies.append(self._add_worker())

    def close(self) -> None:
        self._client.close()
        for process in [*self._nannies, self._scheduler]:
            process.terminate()
        for process in [*self._nannies, self._scheduler]:
            process.wait(30)

    def _add_worker(self) -> subprocess.Popen[bytes]:
        options = ["--nthreads=1", "--nworkers=1", "--no-dashboard", f"--local-directory={self._folder}"]
        return self._run("worker", self.environment["DASK_SCHEDULER_ADDRESS"], *options)

    def _run(self, part: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{part}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", part, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONWARNINGS": "ignore:No datajoint.json found"},
            )


Place = Here | RayCluster | DaskCluster


@contextmanager
def place(executor: str, cpus_of_nodes: Sequence[int] = (1, 1)) -> Iterator[Place]:
    """Give a place for one of the executors' names, and its nodes; each is one slot on Dask."""
    if executor in ("local", "processes"):
        yield Here(executor)
        return
    # Ray puts sockets there, whose paths must stay short
    with tempfile.TemporaryDirectory(prefix=f"{executor}-", ignore_cleanup_errors=True) as folder:
        count = len(cpus_of_nodes)
        cluster = RayCluster(folder, cpus_of_nodes) if executor == "ray" else DaskCluster(folder, count)
        try:
            yield cluster
        finally:
            cluster.close()


def _raylet(node: Any) -> psutil.Process:
    (raylet,) = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
