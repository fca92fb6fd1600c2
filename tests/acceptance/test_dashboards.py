"""What Ray and Dask show of a run; the names of Ray's tasks are tested with the credentials."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import lab as pipelines
from lab import doing
from lab.watching import meanwhile, wait_until

METRIC = re.compile(r"ray_djdist_\w+")
BOARD = Path(__file__).parents[2] / "cluster-configs/grafana/djdist.json"


@pytest.fixture
def metered(lab: ModuleType) -> Any:
    """A table of which no other test's runs have counted anything; each fifth key fails."""

    class Metered(dj.Computed):  # type: ignore[misc, unused-ignore]
        definition = """
        -> Session
        ---
        result : int64
        """

        def make(self, key: dict[str, Any]) -> None:
            n = int((dj.FreeTable(self.connection, self.session) & key).fetch1("n"))
            if n % 5 == 0:
                raise ValueError(f"bad n {n}")
            self.insert1({**key, "result": n})

    Metered.session = lab.Session().full_table_name
    return lab.schema(Metered, context=vars(lab))


@pytest.mark.on("ray")
def test_ray_exports_the_counts_of_a_table_and_logs_the_run(
    lab: ModuleType, metered: Any, ray_cluster: Any
) -> None:
    pipelines.fill(lab, subjects=2, sessions=5)
    metered.populate(reserve_jobs=True, suppress_errors=True, executor="ray", max_calls=9)
    (node,) = ray_cluster.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    failed = len(metered.jobs.errors)
    expected = {
        "jobs_finished_total": 9 - failed,
        "jobs_failed_total": failed,
        "jobs_in_flight": 0,
        "jobs_pending": 0,  # though one key is, because no run is there that will make it
    }

    def exported() -> dict[str, float]:
        lines = [line for line in text_at(address).splitlines() if 'table="Metered"' in line]
        return {name: value_of(f"ray_djdist_{name}{{", lines) for name in expected}

    wait_until(lambda: exported() == expected, "the metrics")
    assert {*METRIC.findall(BOARD.read_text())} <= {*METRIC.findall(text_at(address))}
    logs = Path(ray_cluster._private.worker.global_worker.node.get_logs_dir_path())
    lines = [line for file in logs.glob("worker-*.err") for line in file.read_text().splitlines()]
    begin, slots, end = [line for line in lines if "djdist.driver: " in line and "Metered" in line]
    assert "INFO djdist.driver: Run " in begin
    cluster = ray_cluster.get_runtime_context().gcs_address
    assert f" of {metered.database}.Metered begins on RayExecutor({cluster})" in begin
    assert "Metered has 2 slots, 0 before; 10 keys are pending" in slots
    assert f"Metered is over: {9 - failed} made, {failed} failed, 0 running, 1 pending" in end


def text_at(address: str) -> str:
    with urllib.request.urlopen(address) as answer:
        return str(answer.read().decode())


def value_of(name: str, lines: list[str]) -> float:
    """Add up what all processes say of one metric."""
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.mark.on("dask")
def test_dask_groups_the_tasks_by_table_and_names_them_by_key(lab: ModuleType, dask_client: Any) -> None:
    pipelines.fill(lab, subjects=1, sessions=3)
    lab.Square.populate(reserve_jobs=True, executor=dask_client)
    keys, groups = dask_client.run_on_scheduler(what_the_dashboard_shows)
    assert {key[1] for key in keys if key[0] == "Square"} >= {
        f"subject_id=1, session_date=2026-01-0{day}" for day in (1, 2, 3)
    }
    assert "Square" in groups
    assert any("djdist driver" in str(key) for key in keys)


def what_the_dashboard_shows(dask_scheduler: Any) -> tuple[list[Any], list[str]]:
    """Give the names of all tasks that the scheduler has seen, and of the groups of its progress page."""
    return [event[0] for event in dask_scheduler.transition_log], list(dask_scheduler.task_prefixes)


@pytest.mark.on("dask")
def test_dask_shows_the_counts_beside_the_drivers_worker_while_it_runs(
    lab: ModuleType, dask_client: Any, tmp_path: Path
) -> None:
    pipelines.fill(lab, subjects=1, sessions=6)

    def look() -> None:
        wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two keys to begin")
        wait_until(lambda: "0 made, 0 failed" in counts(dask_client), "the counts")
        doing.open_gate(tmp_path)

    with meanwhile(look):
        lab.Scripted.populate(
            reserve_jobs=True,
            executor=dask_client,
            make_kwargs={"do": doing.wait_at_gate, "folder": str(tmp_path)},
        )
    wait_until(lambda: counts(dask_client) == "", "the counts to vanish")


def counts(client: Any) -> str:
    """Give the column that djdist adds to the page of workers."""
    return "".join(client.run_on_scheduler(column))


def column(dask_scheduler: Any) -> list[str]:
    return [worker.metrics.get("djdist", "") for worker in dask_scheduler.workers.values()]
