"""A Dask cluster on this machine: it imports what its caller can, and nobody else gets in."""

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import distributed
from distributed.deploy.subprocess import SubprocessScheduler, SubprocessWorker
from distributed.worker_memory import parse_memory_limit

from djdist.errors import ClusterError, MissingLibraryError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
IDLE_TIMEOUT = "10 minutes"
"""After it a cluster ends whose caller was killed before it could."""
START_SECONDS = 60.0
POLL_SECONDS = 0.1

START = (
    "import sys; sys.path = list(filter(None, sys.path)); from distributed.cli.dask_spec import main; main()"
)
"""Else ``-m dask`` would put the current folder first, which the caller may not even have on its path."""


@contextmanager
def own_cluster(processes: int) -> Iterator[distributed.SpecCluster]:
    """Start a cluster whose workers, unlike LocalCluster's, don't run the caller's script again.

    Raises
    ------
    MissingLibraryError
        What makes its key isn't installed.
    ClusterError
        Its scheduler doesn't start.
    """
    with TemporaryDirectory(prefix="djdist-dask-", ignore_cleanup_errors=True) as folder:
        key = _new_key(Path(folder))
        memory = parse_memory_limit("auto", 1, processes, logger=logger)
        common = {"host": HOST, "security": key}
        worker = {**common, "nthreads": 1, "memory_limit": memory, "local_directory": folder}
        scheduler = {
            **common,
            "port": 0,
            "dashboard_address": f"{HOST}:8787",
            "idle_timeout": IDLE_TIMEOUT,
            "allowed_failures": 0,
            "scheduler_file": str(Path(folder, "scheduler.json")),
        }
        worker_spec = {"cls": _Worker, "options": {"worker_kwargs": {**worker, "silence_logs": logging.WARN}}}
        cluster = distributed.SpecCluster(
            workers=dict.fromkeys(range(processes), worker_spec),
            scheduler={"cls": _Scheduler, "options": {"scheduler_kwargs": scheduler}},
            worker=worker_spec,
            security=distributed.Security(**key),
            name="djdist",
            silence_logs=logging.WARN,
        )
        with closing(cluster):
            yield cluster


def _new_key(folder: Path) -> dict[str, Any]:
    """Write a key of the cluster's own to a folder that only its owner can read.

    A process's arguments can be read by everybody, so that they name files only.
    """
    try:
        security = distributed.Security.temporary()
    except ImportError as error:
        raise MissingLibraryError(
            "A Dask cluster on this machine needs cryptography, so that nobody else gets in: "
            "pip install cryptography"
        ) from error
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    key.write_text(security.tls_client_key)
    certificate.write_text(security.tls_client_cert)
    keys = {f"tls_{role}_key": str(key) for role in ("client", "scheduler", "worker")}
    certificates = {f"tls_{role}_cert": str(certificate) for role in ("client", "scheduler", "worker")}
    return {"require_encryption": True, "tls_ca_file": str(certificate), **keys, **certificates}


class _Scheduler(SubprocessScheduler):
    """A scheduler that imports what the caller can."""

    async def _start(self) -> None:
        file = Path(self.scheduler_kwargs["scheduler_file"])
        log, give_up_at = file.with_suffix(".log"), time.monotonic() + START_SECONDS
        with log.open("wb") as stderr:
            self.process = await _process("distributed.Scheduler", self.scheduler_kwargs, stderr=stderr)
        while self.process.returncode is None and time.monotonic() < give_up_at:
            with suppress(OSError, ValueError):  # it is not there yet, or half of it
                self.address = json.loads(file.read_text())["address"]
                return
            await asyncio.sleep(POLL_SECONDS)
        raise ClusterError(f"Dask's scheduler doesn't start on this machine: {log.read_text()[-2000:]}")


class _Worker(SubprocessWorker):
    """A worker, with its nanny, that imports what the caller can."""

    async def _start(self) -> None:
        self.process = await _process(self.worker_class, self.worker_kwargs, self.scheduler)


async def _process(
    kind: str, options: dict[str, Any], *arguments: str, **streams: Any
) -> asyncio.subprocess.Process:
    command = [sys.executable, "-c", START, *arguments, "--spec", json.dumps({"cls": kind, "opts": options})]
    return await asyncio.create_subprocess_exec(*command, env=_environment(), **streams)


def _environment() -> dict[str, str]:
    """Return the environment in which a new Python finds what this one finds, in the same order."""
    path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    settings_travel = "ignore:No datajoint.json found"
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": settings_travel}
