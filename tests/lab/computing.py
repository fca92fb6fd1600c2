"""What a make() of Scripted computes with Dask, on the cluster that runs it."""

from __future__ import annotations

import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import dask.array
import datajoint as dj
import distributed
from dask.base import compute as compute_all
from dask.delayed import delayed

import djdist
from lab.doing import Key
from lab.watching import SECONDS
from servers import Server


def compute(table: dj.Table, key: Key, n: int) -> None:
    assert _sum(n) == 4 * n


def compute_in_a_worker_client(table: dj.Table, key: Key, n: int) -> None:
    with distributed.worker_client() as client:
        assert client.gather(client.map(abs, [-n, n], pure=False)) == [n, n]


def wait_for_results(table: dj.Table, key: Key, n: int) -> None:
    """Wait in a way that leaves the slot to nobody in a plain task."""
    client = distributed.get_client()
    assert client.submit(_sum, client.submit(abs, -n, pure=False), pure=False).result() == 4 * n
    assert client.gather(client.map(abs, [-n, n], pure=False)) == [n, n]


def secede_and_wait(table: dj.Table, key: Key, n: int) -> None:
    distributed.secede()
    wait_for_results(table, key, n)
    distributed.rejoin()


def compute_in_chunks_that_compute(table: dj.Table, key: Key, n: int) -> None:
    chunks = [delayed(_sum)(n, pure=False) for _ in range(2)]
    assert compute_all(*chunks) == (4 * n, 4 * n)


def compute_without_end_at_the_first(table: dj.Table, key: Key, n: int, folder: str) -> None:
    """Wait at session 1 for a task on the same worker that never ends."""
    (Path(folder) / f"{n}-begun-{os.getpid()}-{time.monotonic_ns()}").touch()
    here = distributed.get_worker().address
    with distributed.worker_client() as client:
        while n == 1:
            client.submit(time.sleep, SECONDS, workers=[here], pure=False).result()


def populate_in_a_task(module: str, server: Server, executor: str) -> dict[str, Any]:
    """Call populate() in a task, whose process is no worker of djdist yet."""
    connection = server.configure()
    djdist.enable()
    try:
        summary: dict[str, Any] = import_module(module).Square.populate(reserve_jobs=True, executor=executor)
        return summary
    finally:
        djdist.disable()
        connection.close()


def _sum(n: int) -> Any:
    array: Any = dask.array
    return array.full((4,), n, chunks=1).sum().compute()
