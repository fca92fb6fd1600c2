"""Ctrl-C, SIGTERM and SIGKILL, for callers, drivers and workers."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import djdist
import lab as pipelines
from djdist.job_stores.jobs_table.store import JobsTable
from lab import doing
from lab.watching import SECONDS, counts, wait_until

Script = Callable[..., "subprocess.Popen[str]"]

SLEEPING = {
    "mysql": "SELECT 1 FROM information_schema.processlist WHERE info LIKE 'SELECT SLEEP%%'",
    "postgresql": "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'SELECT pg_s%%'",
}
CALL = """
import sys
from {lab} import Scripted
from lab import doing

make_kwargs = {{"do": getattr(doing, sys.argv[1]), "folder": sys.argv[2]}}
print(Scripted.populate(reserve_jobs=True, suppress_errors=True, make_kwargs=make_kwargs, {options}))
"""


def call(lab: ModuleType, options: str = "") -> str:
    return CALL.format(lab=lab.__name__, options=options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_long_query_is_no_error(
    lab: ModuleType, script: Script, tmp_path: Path, connection: Any, number: signal.Signals
) -> None:
    pipelines.fill(lab)
    process = script(call(lab), "sleep_in_the_database", str(tmp_path))
    sleeping = SLEEPING[connection.adapter.backend]
    wait_until(lambda: connection.query(sleeping).fetchone(), "the query")
    process.send_signal(number)
    output, error = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert "success_count" not in output
    assert counts(lab.Scripted) == {"pending": 6}, error
    assert len(lab.Scripted()) == 0


def test_ctrl_c_at_a_terminal_reaches_the_processes_too_and_leaves_them_their_grace(
    lab: ModuleType, script: Script, tmp_path: Path
) -> None:
    pipelines.fill(lab)
    code = "import os\nos.setpgid(0, 0)\n" + call(lab, "processes=2")
    process = script(code, "wait_at_gate", str(tmp_path))
    wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
    os.killpg(process.pid, signal.SIGINT)
    wait_until(lambda: counts(lab.Scripted) == {"reserved": 2, "pending": 4}, "the rest to be given back")
    doing.open_gate(tmp_path)
    _, error = process.communicate(timeout=SECONDS)
    assert "KeyboardInterrupt" in error
    assert counts(lab.Scripted) == {"pending": 4}, error
    assert len(lab.Scripted()) == 2


def test_ctrl_c_just_after_a_reservation_leaves_nothing_reserved(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = JobsTable.reserve

    def reserve_and_be_interrupted(store: JobsTable, *arguments: Any) -> Any:
        jobs = reserve(store, *arguments)
        signal.raise_signal(signal.SIGINT)
        return jobs

    monkeypatch.setattr(JobsTable, "reserve", reserve_and_be_interrupted)
    pipelines.fill(lab)
    with pytest.raises(KeyboardInterrupt):
        lab.Square.populate(reserve_jobs=True)
    assert counts(lab.Square) == {"pending": 6}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("executor", ["ray", "dask"])
def test_a_signal_to_the_caller_lets_the_clusters_tasks_finish_and_gives_back_the_rest(
    request: pytest.FixtureRequest,
    lab: ModuleType,
    script: Script,
    tmp_path: Path,
    executor: str,
    number: signal.Signals,
) -> None:
    pipelines.fill(lab)
    process = script(
        call(lab, f"executor={executor!r}"), "wait_at_gate", str(tmp_path), **address(request, executor)
    )
    wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
    process.send_signal(number)
    wait_until(lambda: counts(lab.Scripted) == {"reserved": 2, "pending": 4}, "the rest to be given back")
    doing.open_gate(tmp_path)
    _, error = process.communicate(timeout=SECONDS)
    assert ("KeyboardInterrupt" if number == signal.SIGINT else "SIGTERM") in error
    assert counts(lab.Scripted) == {"pending": 4}
    assert len(lab.Scripted()) == 2


def address(request: pytest.FixtureRequest, executor: str) -> dict[str, str]:
    """Name the cluster that runs, as the environment does."""
    if executor == "dask":
        return {"DASK_SCHEDULER_ADDRESS": request.getfixturevalue("dask_client").scheduler.address}
    ray = request.getfixturevalue("ray_cluster")
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def test_a_killed_run_leaves_no_half_results_and_the_next_one_makes_what_it_held(
    lab: ModuleType, script: Script, tmp_path: Path
) -> None:
    pipelines.fill(lab)
    process = script(call(lab), "insert_and_wait_at_gate", str(tmp_path), DJDIST_LEASE_SECONDS="1")
    wait_until(lambda: doing.begun(tmp_path), "a job")
    process.kill()
    process.communicate(timeout=SECONDS)
    assert len(lab.Scripted()) == 0
    assert counts(lab.Scripted) == {"pending": 5, "reserved": 1}
    wait_until(lambda: made_all(lab), "the lease to end")
    assert counts(lab.Scripted) == {}


def test_workers_whose_driver_was_killed_change_nothing_once_their_jobs_were_made_by_others(
    lab: ModuleType, script: Script, tmp_path: Path
) -> None:
    pipelines.fill(lab)
    process = script(call(lab, "processes=2"), "wait_at_gate", str(tmp_path), DJDIST_LEASE_SECONDS="1")
    wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    wait_until(lambda: made_all(lab), "the lease to end")
    made = lab.Scripted().to_dicts()
    doing.open_gate(tmp_path)
    _, alive = psutil.wait_procs(workers, timeout=SECONDS)
    for worker in alive:
        worker.kill()
    assert alive == []
    assert lab.Scripted().to_dicts() == made
    assert {row["pid"] for row in made} == {os.getpid()}
    assert counts(lab.Scripted) == {}


def made_all(lab: ModuleType) -> bool:
    lab.Scripted.populate(reserve_jobs=True, make_kwargs={"do": doing.nothing})
    return len(lab.Scripted()) == len(lab.Session())


def test_a_key_that_kills_its_worker_time_and_again_does_not_stop_its_neighbours(
    lab: ModuleType, tmp_path: Path, processes: djdist.LocalExecutor
) -> None:
    pipelines.fill(lab)
    summary = lab.Scripted.populate(
        reserve_jobs=True,
        suppress_errors=True,
        executor=processes,
        make_kwargs={"do": doing.die_at_the_first_while_others_run, "folder": str(tmp_path)},
    )
    assert summary["success_count"] == 5
    ((key, message),) = summary["error_list"]
    assert (lab.Session & key).fetch1("n") == 1
    assert "lost 3 times" in message
    assert counts(lab.Scripted) == {"error": 1}
