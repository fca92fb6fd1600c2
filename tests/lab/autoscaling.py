"""A Ray cluster on this machine that grows and shrinks.

Ray's own AutoscalingCluster would first stop all that is Ray's on this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from lab.watching import wait_until
from servers import free_port

RAY = str(Path(sys.executable).parent / "ray")
COMMON = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
HEAD = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_FAKE_CLUSTER": "1",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "RAY_enable_autoscaler_v2": "1",
}
MEMORY = 100_000_000
IDLE_MINUTES = 0.05
NOTHING: dict[str, Any] = {
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "cluster_synced_files": [],
    "rsync_exclude": [],
    "rsync_filter": [],
}
"""What else Ray wants to be told, though a node on this machine needs no preparation."""


@contextmanager
def autoscaling_ray(workers: int) -> Iterator[dict[str, str]]:
    """Start a head without CPUs, which starts at most so many nodes of one CPU; give what finds it."""
    # Ray puts sockets there, whose paths must stay short
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        port = free_port()
        address = f"{ray.util.get_node_ip_address()}:{port}"  # type: ignore[no-untyped-call]
        config = Path(folder, "autoscaling.json")
        config.write_text(json.dumps(_autoscaling(address, workers)))
        head = _start_head(Path(folder), port, f"--autoscaling-config={config}")
        try:
            wait_until(lambda: _healthy(address), "the head node")
            yield {"RAY_ADDRESS": address, **COMMON}
        finally:
            _end(head)


def _start_head(folder: Path, port: int, *options: str) -> subprocess.Popen[bytes]:
    sizes = ["--num-cpus=0", f"--object-store-memory={MEMORY}", "--include-dashboard=false"]
    places = [f"--port={port}", f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}"]
    with (folder / "start.log").open("w") as log:
        return subprocess.Popen(
            [RAY, "start", "--head", "--block", *sizes, *places, *options],
            env={**os.environ, **COMMON, **HEAD},
            stdout=log,
            stderr=log,
        )


def _healthy(address: str) -> bool:
    check = [RAY, "health-check", "--address", address]
    return subprocess.run(check, env={**os.environ, **COMMON}, capture_output=True).returncode == 0


def _end(head: subprocess.Popen[bytes]) -> None:
    for child in psutil.Process(head.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    head.kill()
    head.wait()


def _autoscaling(address: str, workers: int) -> dict[str, Any]:
    return NOTHING | {
        "cluster_name": "fake",
        "upscaling_speed": workers,
        "max_workers": workers,
        "idle_timeout_minutes": IDLE_MINUTES,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1, "object_store_memory": MEMORY}, "node_config": {}},
        },
        "provider": {
            "type": "external",  # under its own name it needs a file that Ray's wheels leave out
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
    }
