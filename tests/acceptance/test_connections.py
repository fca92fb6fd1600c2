"""How many connections a run takes, and what it does when there are not enough."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lab as pipelines
import servers
from lab import doing
from lab.watching import meanwhile, wait_until

DRIVERS = 2
OPEN = {
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE user = 'djdist'",
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE usename = 'djdist'",
}


def test_a_run_takes_one_for_each_worker_and_two(
    lab: ModuleType, server: servers.Server, remote_executor: Any, tmp_path: Path
) -> None:
    pipelines.fill(lab)
    watcher = server.connect()

    def connections() -> int:
        return int(watcher.query(OPEN[server.backend]).fetchone()[0])

    before, during = connections(), []

    def count_and_let_go_on() -> None:
        wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
        during.append(connections())
        doing.open_gate(tmp_path)

    arguments = {"do": doing.wait_at_gate, "folder": str(tmp_path)}
    with meanwhile(count_and_let_go_on):
        lab.Scripted.populate(reserve_jobs=True, executor=remote_executor, make_kwargs=arguments)
    assert during[0] - before <= 2 + DRIVERS
    assert connections() <= before + 2
    watcher.close()


@pytest.mark.on("dask")
def test_threads_may_share_the_callers_connection(lab: ModuleType, dask_client: Any) -> None:
    pipelines.fill(lab)
    tables = [lab.Square, lab.Reading, lab.Stats, lab.Kwargs]
    together = threading.Barrier(len(tables))

    def populate(table: Any) -> int:
        together.wait()
        return int(table.populate(reserve_jobs=True, executor=dask_client)["success_count"])

    with ThreadPoolExecutor(len(tables)) as threads:
        assert list(threads.map(populate, tables)) == [6] * len(tables)
