"""The command ``djdist`` and ``djdist.progress()``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import pandas as pd
import pytest

import djdist
import lab as pipelines
from conftest import TESTS
from djdist.jobs import Jobs
from lab.others import ALIVE, DEAD, change
from lab.watching import SECONDS, wait_until
from servers import Server

typer_testing = pytest.importorskip("typer.testing", reason="pip install 'djdist[cli]'")

Shell = Callable[..., "subprocess.Popen[str]"]
Djdist = Callable[..., Any]

SCRIPT = "import sys; from djdist.__main__ import main; sys.exit(main())"


@pytest.fixture
def shell(server: Server, modules_folder: Path, tmp_path: Path) -> Iterator[Shell]:
    """Starts `djdist` as an installed command does, in the folder of the pipeline's module."""
    started: list[subprocess.Popen[str]] = []
    command = tmp_path / "djdist"
    command.write_text(SCRIPT)
    database = {
        "DJ_BACKEND": server.backend,
        "DJ_HOST": server.host,
        "DJ_PORT": str(server.port),
        "DJ_USER": server.user,
        "DJ_PASS": server.password,
        "DJ_DATABASE_NAME": server.database_name or "",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "PYTHONWARNINGS": "ignore",
    }

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(command), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=modules_folder,
            env={**os.environ, **database, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run() -> Djdist:
    """Runs `djdist` in this process."""
    from djdist.cli.commands import app

    def run(*arguments: str) -> Any:
        return typer_testing.CliRunner().invoke(app, arguments, catch_exceptions=False)

    return run


@pytest.mark.on("local")
class TestFromAShell:
    def test_populate_and_status(self, lab: ModuleType, shell: Shell) -> None:
        pipelines.fill(lab, subjects=2, sessions=5)
        name = lab.__name__
        populate = shell("populate", f"{name}:Fragile", "subject_id = 1", "--watch")
        output, error = populate.communicate(timeout=SECONDS)
        assert (populate.returncode, output) == (1, "4 made, 1 errors left\n"), error
        assert "5/5" in error
        assert f"See them: djdist errors {name}:Fragile" in error
        status = shell("status", f"{name}:Fragile", f"{name}:Square", "--json")
        output, error = status.communicate(timeout=SECONDS)
        fragile, square = json.loads(output)
        assert status.returncode == 0
        assert (fragile["table"], fragile["error"], fragile["done"], fragile["total"]) == (
            "Fragile",
            1,
            4,
            10,
        )
        assert (square["table"], square["done"], square["seconds_left"]) == ("Square", 0, None)

    def test_top_is_live_until_ctrl_c(self, lab: ModuleType, shell: Shell) -> None:
        pipelines.fill(lab)
        lab.Square.jobs.refresh()
        options = ("--every-seconds", "0.1")
        top = shell("top", f"{lab.__name__}:Square", *options, TTY_COMPATIBLE="1", NO_COLOR="1")
        assert top.stdout is not None
        shown = iter(top.stdout.readline, "")
        assert any("0 of 6" in line for line in shown)
        lab.Square.populate(reserve_jobs=True)
        assert any("6 of 6" in line for line in shown)
        top.send_signal(signal.SIGINT)
        _, error = top.communicate(timeout=SECONDS)
        assert top.returncode == 0, error

    def test_no_database_is_one_clear_line(self, lab: ModuleType, shell: Shell) -> None:
        status = shell("status", lab.__name__, DJ_PORT="1")
        output, error = status.communicate(timeout=SECONDS)
        assert (status.returncode, output) == (2, "")
        assert f"djdist: {lab.__name__} can't reach its database" in error.splitlines()[-1]
        assert "Traceback" not in error


@pytest.mark.long
@pytest.mark.on("ray")
def test_populate_on_ray(lab: ModuleType, shell: Shell, ray_cluster: Any) -> None:
    pipelines.fill(lab)
    address = ray_cluster.get_runtime_context().gcs_address
    populate = shell("populate", f"{lab.__name__}:Square", "--executor", "ray", "--address", address)
    output, error = populate.communicate(timeout=2 * SECONDS)
    assert (populate.returncode, output) == (0, "6 made, 0 errors left\n"), error
    detached = shell("populate", f"{lab.__name__}:Reading", "-e", "ray", "--detach", RAY_ADDRESS=address)
    output, error = detached.communicate(timeout=2 * SECONDS)
    assert detached.returncode == 0, error
    assert f"goes on. Look at it: djdist top {lab.__name__}:Reading" in output
    wait_until(lambda: len(lab.Reading()) == 6, "the detached run")


class TestPutRight:
    def test_errors_are_listed_retried_and_ignored(self, lab: ModuleType, run: Djdist) -> None:
        pipelines.fill(lab, subjects=3, sessions=5)
        name = f"{lab.__name__}:Fragile"
        assert run("errors", name).stdout == "No errors.\n"
        assert not Jobs(lab.Fragile()).is_declared
        assert run("populate", name).exit_code == 1
        listed = run("errors", name, "--traceback").stdout
        assert listed.startswith("3 × ValueError: bad n …\n    subject_id=")
        assert "Traceback (most recent call last)" in listed
        (cause,) = json.loads(run("errors", name, "subject_id > 1", "--json", "--traceback").stdout)
        assert (cause["cause"], cause["errors"]) == ("ValueError: bad n …", 2)
        assert {job["key"]["subject_id"] for job in cause["jobs"]} == {2, 3}
        assert all("raise ValueError" in job["traceback"] for job in cause["jobs"])
        assert run("ignore", name, "subject_id = 1").stdout == "1 jobs are ignored from now on\n"
        lab.Fix.insert(lab.Session & "subject_id > 1", ignore_extra_fields=True)
        assert run("retry", name, "error_message LIKE 'ValueError%'").stdout.startswith(
            "2 errors are pending"
        )
        populated = run("populate", name)
        assert (populated.exit_code, populated.stdout) == (0, "2 made, 0 errors left\n")

    def test_refresh_and_rescue(self, lab: ModuleType, run: Djdist) -> None:
        pipelines.fill(lab)
        name = f"{lab.__name__}:Square"
        assert (
            "Square: 0 orphaned, 3 added" in run("refresh", name, "subject_id = 1", "--priority", "1").stdout
        )
        assert set(lab.Square.jobs.to_arrays("priority")) == {1}
        change(lab.Square.jobs, "TRUE", status="reserved", connection_id=DEAD, reserved_time="2026-01-01")
        rescued = run("rescue", lab.__name__).stdout.splitlines()
        assert rescued[:2] == ["Square: 3 jobs rescued", "Reading: 0 jobs rescued"]
        assert len(lab.Square.jobs.pending) == 3
        assert not Jobs(lab.Reading()).is_declared

    @pytest.mark.on("local")
    def test_ctrl_c_and_sigterm_have_their_own_exit_codes(
        self, lab: ModuleType, run: Djdist, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipelines.fill(lab)
        for number in (signal.SIGINT, signal.SIGTERM):
            monkeypatch.setattr(lab.Square, "make", lambda self, key, n=number: signal.raise_signal(n))
            stopped = run("populate", f"{lab.__name__}:Square")
            assert stopped.exit_code == 128 + number
            assert stopped.stderr.endswith("djdist: stopped\n")
        assert len(lab.Square.jobs.pending) == 6

    @pytest.mark.on("local")
    def test_a_report(self, lab: ModuleType, run: Djdist, tmp_path: Path) -> None:
        file = tmp_path / "report.html"
        assert run("report", f"{lab.__name__}:Square", "--output", str(file)).stdout == f"{file}\n"
        assert "<title>Square: 0 made, 0 failed" in file.read_text()


class TestProgress:
    def test_a_row_for_each_table(self, lab: ModuleType, run: Djdist) -> None:
        pipelines.fill(lab, subjects=3, sessions=10)
        with dj.config.override(jobs__keep_completed=True):
            lab.Fragile.populate("subject_id < 3", reserve_jobs=True, suppress_errors=True)
        lab.Fragile.jobs.refresh()
        change(lab.Fragile.jobs, "subject_id = 3", status="reserved", connection_id=ALIVE)
        change(lab.Fragile.jobs, "session_date = '2026-01-05'", status="ignore")
        lab.Square.populate("subject_id = 1")
        of_module = djdist.progress(lab)
        assert list(of_module.index[:3]) == ["Square", "Reading", "Fragile"]
        square, fragile = (row for _, row in djdist.progress(lab.Square, lab.Fragile()).iterrows())
        assert (square["done"], square["total"], square["runs"]) == (10, 30, 0)
        assert pd.isna(square["seconds_left"])
        statuses = ["pending", "reserved", "error", "ignore", "done", "total", "runs"]
        assert list(fragile[statuses]) == [0, 9, 2, 3, 16, 30, 1]
        assert fragile["seconds_left"] == pytest.approx(9 / fragile["keys_per_second"])
        assert not Jobs(lab.Square()).is_declared
        heading, line = run("status", f"{lab.__name__}:Fragile").stdout.splitlines()
        assert heading.split()[:5] == ["table", "done", "%", "pending", "reserved"]
        assert line.split()[:10] == ["Fragile", "16", "of", "30", "53", "%", "·", "9", "2", "3"]

    def test_a_rate_that_no_job_tells_is_measured(self) -> None:
        from djdist.cli.printing import _measured

        first = pd.DataFrame(
            {"done": [1, 1], "pending": [9, 9], "reserved": 1, "keys_per_second": [None, 5.0]}
        )
        later = _measured(first.assign(done=[11, 1]), first, seconds=5)
        assert list(later["keys_per_second"]) == [2, 5]
        assert list(later["seconds_left"]) == [5, 2]


@pytest.mark.on("local")
class TestMistakes:
    def test_are_one_line_and_exit_code_2(self, lab: ModuleType, run: Djdist, modules_folder: Path) -> None:
        pipelines.fill(lab)
        modules = {
            "without_tables": "import datajoint",
            "broken": "1 / 0",
            "in_need": "import no_such_library",
        }
        for name, code in modules.items():
            (modules_folder / f"{name}.py").write_text(code)
        for arguments, message in MISTAKES.items():
            result = run(*arguments.replace("LAB", lab.__name__).split("|"))
            assert result.exit_code == 2, arguments
            assert result.stdout == ""
            assert message.replace("LAB", lab.__name__) in result.stderr, arguments
            assert result.stderr.startswith("djdist: ")
            assert result.stderr.count("\n") == 1
        assert not Jobs(lab.Square()).is_declared

    def test_progress_needs_something_to_look_at(self, lab: ModuleType) -> None:
        for nothing, message in {(): "needs a module or a table", (lab.Session,): "has no jobs"}.items():
            with pytest.raises(djdist.OptionError, match=message):
                djdist.progress(*nothing)

    def test_a_bug_keeps_its_traceback(self, lab: ModuleType, run: Djdist, monkeypatch: Any) -> None:
        monkeypatch.setattr(djdist, "report", lambda *tables, file: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("report", lab.__name__)


MODULES = {"without_tables": "import datajoint", "broken": "1 / 0", "in_need": "import no_such_library"}
MISTAKES = {
    "status|no_such_module": "There is no module 'no_such_module' in this folder or installed",
    "status|without_tables.py": "my_pipeline for my_pipeline.py",
    "status|": "can't be imported: ValueError",
    "status|broken": "broken can't be imported: ZeroDivisionError: division by zero",
    "status|in_need": "No module named 'no_such_library'",
    "status|without_tables": "without_tables has no dj.Computed or dj.Imported tables",
    "populate|LAB": "Which table of LAB? There are: LAB:Square, LAB:Reading",
    "populate|LAB:Squares": "LAB has no table Squares. Its auto-populated tables are: Square, Reading",
    "populate|LAB:Session": "LAB:Session is not a dj.Computed or dj.Imported table",
    "errors|LAB:SCHEMA": "LAB:SCHEMA is not a dj.Computed or dj.Imported table",
    "populate|LAB:Square|nonsense = 3": "'nonsense = 3' is no restriction: ",
    "populate|LAB:Square|n = 1|subject_id =": "'n = 1 AND subject_id =' is no restriction: ",
    "refresh|LAB:Square|nonsense": "'nonsense' is no restriction: ",
    "populate|LAB:Square|--executor|slurm": "There is no executor 'slurm'",
    "populate|LAB:Square|--address|head:8786": "--address goes with --executor ray or --executor dask",
    "populate|LAB:Square|--max-calls|-1": "max_calls=-1 must be a whole number from 0",
    "populate|LAB:Square|--detach": "is no cluster that lives longer than this call",
    "report|LAB|--output|report.pdf": "must end in .html or .png",
}


def test_without_typer_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from djdist.__main__ import main

    monkeypatch.delitem(sys.modules, "djdist.cli.commands", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == 'djdist: the command line needs typer: pip install "djdist[cli]"\n'
