"""Several workers of several kinds on one table."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from lab import doing
from lab.watching import SECONDS, counts, wait_until

Script = Callable[..., "subprocess.Popen[str]"]

WORKER = """
import pathlib, sys, time
from {lab} import Logged

folder = pathlib.Path(sys.argv[1])
(folder / f"{{sys.argv[2]}}-begun-").touch()
while not (folder / "gate").exists():
    time.sleep(0.01)
made, seconds = 0, {{"seconds": 0.1}}
while count := Logged.populate(reserve_jobs=True, make_kwargs=seconds, {options})["success_count"]:
    made += count
print("made", made)
"""


REFRESHERS = """
import pathlib, sys, time
import datajoint as dj
from {lab} import Scripted

orphaned, folder = [], pathlib.Path(sys.argv[1])
while not (folder / "done").exists():
    djdist.disable()
    orphaned.append(Scripted.jobs.refresh(orphan_timeout={seconds})["orphaned"])
    djdist.enable()
    orphaned.append(Scripted.jobs.refresh(orphan_timeout={seconds})["orphaned"])
    if len(orphaned) > 10:
        (folder / "looked").touch()
    time.sleep(0.05)
print("orphaned", sum(orphaned))
"""

DRIVERS = """
import multiprocessing, sys
from {lab} import Logged

def drive(start):
    Logged.connection.connect()
    start.wait()
    Logged.populate(reserve_jobs=True, refresh=False, make_kwargs={{"seconds": 0.02}})

Logged.jobs.refresh()  # which else they do one after the other
processes = multiprocessing.get_context("fork")
start = processes.Barrier({count})
drivers = [processes.Process(target=drive, args=(start,)) for _ in range({count})]
for driver in drivers:
    driver.start()
for driver in drivers:
    driver.join()
sys.exit(any(driver.exitcode for driver in drivers))
"""


def start_together(script: Script, folder: Path, *codes: str) -> list[int]:
    """Run workers that begin at the same time, and give what each of them made."""
    workers = [script(code, str(folder), str(n)) for n, code in enumerate(codes)]
    wait_until(lambda: len(doing.begun(folder)) == len(codes), "the workers")
    doing.open_gate(folder)
    made = []
    for worker in workers:
        output, error = worker.communicate(timeout=SECONDS)
        assert worker.returncode == 0, error
        made.append(int(output.split()[-1]))
    return made


@pytest.mark.long_on("dask")
@pytest.mark.long_on("processes")
@pytest.mark.parametrize("other", ["local", "processes", "dask", "native"])
def test_drivers_that_begin_together_share_the_keys(
    lab: ModuleType, script: Script, tmp_path: Path, dask_client: Any, other: str
) -> None:
    pipelines.fill(lab, subjects=5, sessions=8)
    on_dask = f"executor=djdist.DaskExecutor({dask_client.scheduler.address!r})"
    options = {"processes": "processes=2", "dask": on_dask}.get(other, "")
    companion = WORKER.format(lab=lab.__name__, options=options)
    if other == "native":
        assert len(lab.Logged.jobs) == 0  # declared now, because natives can't do it beside others
        companion = "djdist.disable()\n" + companion
    made = start_together(script, tmp_path, WORKER.format(lab=lab.__name__, options=""), companion)
    assert sum(made) == len(lab.Logged()) == 40
    assert min(made) > 0
    assert counts(lab.Logged) == {}


@pytest.mark.long
def test_many_drivers_share_the_keys_fairly(lab: ModuleType, script: Script) -> None:
    drivers, keys_each = 32, 100
    pipelines.fill(lab, subjects=drivers, sessions=keys_each)
    run = script(DRIVERS.format(lab=lab.__name__, count=drivers))
    _, errors = run.communicate(timeout=2 * SECONDS)
    assert run.returncode == 0, errors
    made = Counter(lab.Logged.to_arrays("pid").tolist())
    assert sum(made.values()) == drivers * keys_each
    assert len(made) == drivers
    assert min(made.values()) > keys_each / 4
    assert counts(lab.Logged) == {}


@pytest.mark.parametrize("reserve_jobs", [True, False])
def test_failed_keys_count_as_calls(lab: ModuleType, executor: Any, reserve_jobs: bool) -> None:
    pipelines.fill(lab, subjects=2, sessions=5)
    summary = lab.Fragile.populate(
        reserve_jobs=reserve_jobs, max_calls=5, suppress_errors=True, executor=executor
    )
    assert (summary["success_count"], len(summary["error_list"])) == (4, 1)
    assert len(lab.Fragile()) == 4


def test_what_a_native_worker_holds_is_left_to_it_until_it_is_freed(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    lab.Square.jobs.refresh()
    for key in lab.Square.jobs.pending.keys(limit=2):
        assert lab.Square.jobs.reserve(key)
    assert lab.Square.populate(reserve_jobs=True, executor=executor)["success_count"] == 4
    assert counts(lab.Square) == {"reserved": 2}
    wait_until(lambda: lab.Square.jobs.refresh(orphan_timeout=0.01)["orphaned"] == 2)
    assert lab.Square.populate(reserve_jobs=True, executor=executor)["success_count"] == 2


@pytest.mark.long_on("dask")
@pytest.mark.long
def test_a_job_that_takes_longer_than_its_lease_is_left_to_its_run(
    lab: ModuleType, script: Script, executor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease_seconds = 2
    monkeypatch.setattr(djdist.config, "lease_seconds", lease_seconds)
    pipelines.fill(lab, subjects=1, sessions=1)
    refreshers = script(REFRESHERS.format(lab=lab.__name__, seconds=lease_seconds), str(tmp_path))
    busy = {"do": doing.keep_the_processor_busy, "folder": str(tmp_path), "seconds": 2 * lease_seconds}
    summary = lab.Scripted.populate(reserve_jobs=True, executor=executor, make_kwargs=busy)
    (tmp_path / "done").touch()
    output, error = refreshers.communicate(timeout=SECONDS)
    assert summary == {"success_count": 1, "error_list": []}
    assert doing.begun(tmp_path) == [1]
    assert output.splitlines()[-1] == "orphaned 0", error


def test_a_key_that_others_make_meanwhile_counts_as_there(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab, subjects=1, sessions=2)
    options = {"reserve_jobs": True, "make_kwargs": {"do": doing.be_overtaken}}
    assert lab.Scripted.populate(executor=executor, **options) == {"success_count": 0, "error_list": []}
    assert set(lab.Scripted().to_arrays("pid")) == {0}
    assert counts(lab.Scripted) == {}
