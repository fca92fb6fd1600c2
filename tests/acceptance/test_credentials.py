"""The password goes to the workers and shows nowhere."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from lab.watching import SECONDS
from servers import Server

# it makes a key, one that fails, and a worker that can't be set up, all of which engines log
CALLS = """
import sys, types
from {lab} import Fragile, Square

Square.populate(reserve_jobs=True, executor={executor!r})
Fragile.populate(reserve_jobs=True, suppress_errors=True, executor={executor!r})
Square.__module__ = "no_such_module"
sys.modules["no_such_module"] = types.ModuleType("no_such_module")
sys.modules["no_such_module"].Square = Square
try:
    Square.populate(reserve_jobs=True, executor={executor!r})
except djdist.WorkerSetupError as error:
    print(error)
"""

TASKS = """
import time
from ray.util.state import list_actors, list_tasks
where = {"address": ray.get_runtime_context().gcs_address, "detail": True, "limit": 1000}
deadline = time.monotonic() + 60
last = "Fragile(subject_id=1, session_date=2026-01-02)"
while last not in str(list_tasks(**where)) and time.monotonic() < deadline:
    time.sleep(0.2)  # workers report their tasks about once a second
print(list_tasks(**where), list_actors(**where))
"""

RAY = """
import ray
ray.init(num_cpus=1, include_dashboard=True, _temp_dir=sys.argv[1], log_to_driver=True)
"""


def found_in(folder: Path, secret: str) -> list[str]:
    """List the files that hold a text."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return [str(file) for file in files if secret.encode() in file.read_bytes()]


@pytest.mark.long
@pytest.mark.on("ray")
@pytest.mark.timeout(400)
def test_on_ray_the_state_api_names_tasks_by_table_and_key_and_shows_no_password(
    lab: ModuleType, script: Callable[..., subprocess.Popen[str]], server: Server, tmp_path_factory: Any
) -> None:
    import tempfile

    pipelines.fill(lab, subjects=1, sessions=5)
    code = CALLS.format(lab=lab.__name__, executor="ray")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        process = script("import sys" + RAY + code + TASKS, folder)
        output, error = process.communicate(timeout=2 * SECONDS)
        assert process.returncode == 0, error
        assert "Square(subject_id=1, session_date=2026-01-01)" in output
        assert "Fragile(subject_id=1, session_date=2026-01-02)" in output
        assert "djdist drivers" in output
        assert "djdist driver of Square" in output
        assert "can't make Square" in output
        assert server.password not in output + error
        assert found_in(Path(folder), server.password) == []


def test_on_dask_neither_in_names_of_tasks_nor_in_logs(
    lab: ModuleType, server: Server, dask_client: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    pipelines.fill(lab, subjects=1, sessions=5)
    for table in (lab.Square, lab.Fragile):
        table.populate(reserve_jobs=True, suppress_errors=True, executor=dask_client)
    seen = [dask_client.story, dask_client.get_scheduler_logs(), dask_client.get_worker_logs()]
    names = dask_client.run_on_scheduler(names_of_tasks)
    assert ("Square", "subject_id=1, session_date=2026-01-01") in {name[:2] for name in names}
    captured = capfd.readouterr()
    assert server.password not in f"{seen} {names} {captured.out} {captured.err}"


def names_of_tasks(dask_scheduler: Any) -> list[Any]:
    """List the keys of all tasks that the scheduler has seen."""
    return [event[0] for event in dask_scheduler.transition_log]


def test_neither_in_log_records_nor_in_what_prints(
    lab: ModuleType, executor: Any, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    printed: list[str] = []
    from djdist import driver

    def drive_and_print(*arguments: Any, **options: Any) -> Any:
        printed.append(f"{arguments} {options}")
        return driver.drive(*arguments, **options)

    monkeypatch.setattr(import_module("djdist._populate"), "drive", drive_and_print)
    pipelines.fill(lab, subjects=1, sessions=2)
    lab.Square.populate(reserve_jobs=True, executor=executor)
    assert server.password not in caplog.text + "".join(printed)
    assert server.password not in f"{djdist.config!r} {lab.Square.jobs!r}"
