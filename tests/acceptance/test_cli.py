"""The command ``djdist`` and ``djdist.progress()``."""

from __future__ import annotations

import json
import logging
import math
import os
import pty
import re
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
from djdist.cli import clusters
from djdist.jobs.table import Jobs
from lab import doing
from lab.others import ALIVE, DEAD, change
from lab.relay import relayed
from lab.watching import SECONDS, counts, meanwhile, wait_until
from servers import Server

typer_testing = pytest.importorskip("typer.testing", reason="pip install 'djdist[cli]'")

Shell = Callable[..., "subprocess.Popen[str]"]
Djdist = Callable[..., Any]

STYLE = r"\x1b\[[0-9;]*m"
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

    def start(*arguments: str, stdout: int = subprocess.PIPE, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(command), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
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
def run() -> Iterator[Djdist]:
    """Runs `djdist` in this process."""
    from djdist.cli.commands import app

    def run(*arguments: str) -> Any:
        return typer_testing.CliRunner().invoke(app, arguments, catch_exceptions=False)

    loggers = [logging.getLogger(name) for name in ("djdist", "datajoint")]
    before = [(logger.handlers, logger.level) for logger in loggers]
    yield run
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers = handlers
        logger.setLevel(level)


@pytest.mark.on("local")
class TestFromAShell:
    def test_populate_and_status(self, lab: ModuleType, shell: Shell) -> None:
        pipelines.fill(lab, subjects=2, sessions=5)
        name = lab.__name__
        populate = shell("populate", f"{name}:Fragile", "subject_id = 1", "--bar", "-v")
        output, error = populate.communicate(timeout=SECONDS)
        assert (populate.returncode, output) == (1, "4 made, 1 error left\n"), error
        assert "5/5" in error
        lines = error.replace("\r", "\n").splitlines()
        assert any(line.endswith("4 made, 1 failed, 0 running, 0 pending") for line in lines)
        assert all(" INFO djdist.driver: " in line for line in lines if "begins on" in line)
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
        assert any(re.search(r"\d\d:\d\d:\d\d, every 0.1 s, Ctrl-C ends it", line) for line in shown)
        lab.Square.populate(reserve_jobs=True)
        assert any("6 of 6" in line for line in shown)
        top.send_signal(signal.SIGINT)
        _, error = top.communicate(timeout=SECONDS)
        assert top.returncode == 0, error

    @pytest.mark.long
    def test_top_shows_what_was_last_seen_while_the_database_is_away(
        self, lab: ModuleType, shell: Shell, server: Server
    ) -> None:
        pipelines.fill(lab)
        with relayed(server.host, server.port) as relay:
            port, terminal = str(relay.port), {"TTY_COMPATIBLE": "1", "NO_COLOR": "1"}
            top = shell("top", f"{lab.__name__}:Square", "--every-seconds", "0.1", DJ_PORT=port, **terminal)
            assert top.stdout is not None
            shown = iter(top.stdout.readline, "")
            assert any("0 of 6" in line for line in shown)
            relay.go_out()
            before = next(line for line in shown if "0 of 6" in line)
            assert any("database away since" in line for line in shown)
            assert any(line == before for line in shown)
            relay.come_back()
            lab.Square.populate()
            assert any("6 of 6" in line for line in shown)
            top.send_signal(signal.SIGINT)
            _, error = top.communicate(timeout=SECONDS)
        assert top.returncode == 0, error

    @pytest.mark.parametrize(
        ("columns", "headings", "longest", "shortest"),
        [
            pytest.param(
                *("80", "new pending reserved error ignore runs rate left", "· 20 10 · · 1", "30 · · · · ·"),
                marks=pytest.mark.long,
            ),
            ("72", "new pending reserved runs rate left", "· 20 10 1", "30 · · ·"),
        ],
    )
    def test_a_table_is_one_line_in_a_narrow_terminal(
        self, lab: ModuleType, shell: Shell, columns: str, headings: str, longest: str, shortest: str
    ) -> None:
        pipelines.fill(lab, subjects=3, sessions=10)
        lab.TripartiteGenerator.jobs.refresh()
        change(lab.TripartiteGenerator.jobs, "subject_id = 1", status="reserved", connection_id=ALIVE)
        names = [f"{lab.__name__}:{table}" for table in ("TripartiteGenerator", "Fragile")]
        terminal, its_end = pty.openpty()
        status = shell("status", *names, stdout=its_end, COLUMNS=columns, NO_COLOR="1", TERM="xterm")
        os.close(its_end)
        assert status.wait(SECONDS) == 0
        with open(terminal) as output:
            shown = [" ".join(re.sub(STYLE, "", output.readline()).split()) for _ in range(3)]
        assert shown == [
            f"table done % {headings}",
            f"TripartiteGenerator 0 of 30 0 % {longest}",
            f"Fragile 0 of 30 0 % {shortest}",
        ]

    def test_settings_that_make_no_sense_are_one_clear_line(self, shell: Shell) -> None:
        for name, setting in {"DJDIST_RETRIES": "retries='abc'", "DJ_PORT": "DJ_PORT='abc'"}.items():
            status = shell("status", "any_pipeline", **{name: "abc"})
            output, error = status.communicate(timeout=SECONDS)
            assert (status.returncode, output, error.count("\n")) == (2, "", 1), error
            assert setting in error

    @pytest.mark.long
    def test_nobody_is_told_to_write_datajoint_json(self, lab: ModuleType, shell: Shell) -> None:
        status = shell("status", lab.__name__, PYTHONWARNINGS="default")
        _, error = status.communicate(timeout=SECONDS)
        assert status.returncode == 0, error
        assert "datajoint.json" not in error

    def test_help_and_completion_load_no_datajoint(self, lab: ModuleType, shell: Shell) -> None:
        bash, loading = {"_DJDIST_COMPLETE": "complete_bash"}, {"PYTHONPROFILEIMPORTTIME": "1"}
        executor = {"COMP_WORDS": "djdist populate my_pipeline:Table --executor ", "COMP_CWORD": "4"}
        module = {"COMP_WORDS": f"djdist status {lab.__name__[:-1]}", "COMP_CWORD": "2"}
        for arguments, environment, answer in (
            ((), bash | executor, "local\nray\ndask"),
            ((), bash | module, lab.__name__),
            (("--version",), {}, f"djdist {djdist.__version__}"),
            (("populate", "--help"), {}, "--num-gpus"),
        ):
            output, loaded = shell(*arguments, **environment, **loading).communicate(timeout=SECONDS)
            assert answer in output
            assert "djdist.cli.commands" in loaded
            assert "datajoint" not in loaded
            assert "pandas" not in loaded

    def test_a_refused_login_is_one_clear_line(self, lab: ModuleType, shell: Shell, server: Server) -> None:
        status = shell("status", lab.__name__, DJ_PASS="wrong")
        output, error = status.communicate(timeout=SECONDS)
        assert (status.returncode, output) == (2, "")
        line = error.splitlines()[-1]
        assert f"at {server.host}:{server.port} refuses the login of {server.user}" in line
        assert "Set DJ_USER and DJ_PASS" in line

    @pytest.mark.long
    def test_a_terminal_that_knows_ascii_only(self, lab: ModuleType, shell: Shell) -> None:
        pipelines.fill(lab, subjects=1, sessions=5)
        with pytest.raises(ValueError, match="bad n 5"):
            lab.Fragile.populate(reserve_jobs=True)
        name, ascii_only = f"{lab.__name__}:Fragile", {"PYTHONIOENCODING": "ascii"}
        for command, shown in (("status", " - "), ("errors", "1 x ValueError: bad n 5")):
            asked = shell(command, name, **ascii_only)
            output, error = asked.communicate(timeout=SECONDS)
            assert asked.returncode == 0, error
            assert shown in output

    @pytest.mark.parametrize(
        ("flags", "lines"),
        [
            pytest.param((), 0, marks=pytest.mark.long),
            (("-v",), 2),
            pytest.param(("-q",), 0, marks=pytest.mark.long),
        ],
    )
    @pytest.mark.long_on("flags1")
    def test_what_a_run_does_is_logged_on_request(
        self, lab: ModuleType, shell: Shell, flags: tuple[str, ...], lines: int
    ) -> None:
        pipelines.fill(lab)
        for arguments in ((*flags, "populate", "Square"), ("populate", "Reading", *flags)):
            command = [*arguments]
            position = command.index("populate") + 1
            command[position] = f"{lab.__name__}:{command[position]}"
            populate = shell(*command)
            output, error = populate.communicate(timeout=SECONDS)
            assert (populate.returncode, output) == (0, "6 made, 0 errors left\n"), error
            told = [line for line in error.splitlines() if "INFO djdist.driver: Run" in line]
            assert len(told) == lines, error

    def test_no_database_is_one_clear_line(self, lab: ModuleType, shell: Shell) -> None:
        status = shell("status", lab.__name__, DJ_PORT="1")
        output, error = status.communicate(timeout=SECONDS)
        assert (status.returncode, output) == (3, "")
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
    assert f"goes on. Look at it, wait for it or stop it:\n  djdist top {lab.__name__}:Reading\n" in output
    wait_until(lambda: len(lab.Reading()) == 6, "the detached run")


@pytest.fixture(params=["ray", "dask"])
def cluster(request: pytest.FixtureRequest) -> tuple[Any, tuple[str, ...]]:
    """A cluster as this process gives it to djdist, and as the command line names it."""
    if request.param == "ray":
        ray = request.getfixturevalue("ray_cluster")
        return "ray", ("--executor", "ray", "--address", ray.get_runtime_context().gcs_address)
    client = request.getfixturevalue("dask_client")
    return client, ("--executor", "dask", "--address", client.scheduler.address)


@pytest.mark.long
def test_runs_are_found_stopped_and_waited_for(
    lab: ModuleType,
    shell: Shell,
    cluster: tuple[Any, tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipelines.fill(lab)
    monkeypatch.setattr(djdist.config, "grace_seconds", SECONDS)
    executor, flags = cluster
    make_kwargs = {"do": doing.wait_at_gate, "folder": str(tmp_path)}
    options = {"reserve_jobs": True, "suppress_errors": True, "make_kwargs": make_kwargs}
    run = lab.Scripted.populate(executor=executor, detach=True, **options)
    wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")

    def told(*arguments: str) -> tuple[int, str]:
        process = shell(*arguments, *flags)
        output, error = process.communicate(timeout=SECONDS)
        assert "Traceback" not in error
        return process.returncode, output + error

    code, output = told("runs")
    assert f"{lab.SCHEMA}.Scripted" in output
    code, output = told("runs", "--json")
    (listed,) = [record for record in json.loads(output) if record["run"] == run.info.id]
    assert (listed["table"], listed["schema"], listed["detached"]) == ("Scripted", lab.SCHEMA, True)
    code, output = told("stop", "no-run")
    assert code == 2
    assert "There is no run 'no-run' on the cluster; there are" in output
    assert told("stop", run.info.id) == (0, f"{run.info} reserves no more keys\n")
    wait_until(lambda: counts(lab.Scripted) == {"reserved": 2, "pending": 4}, "the rest to be given back")
    waiting = shell("wait", run.info.id, *flags)
    doing.open_gate(tmp_path)
    output, error = waiting.communicate(timeout=SECONDS)
    assert (waiting.returncode, output) == (0, "2 made, 0 failed\n"), error


class TestResources:
    def test_are_what_the_executor_gets(
        self, lab: ModuleType, run: Djdist, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: list[Any] = []

        def executor_class(name: str) -> Any:
            def executor(*arguments: Any, **options: Any) -> str:
                given.append((name, arguments, options))
                return "local"

            return executor

        monkeypatch.setattr(clusters, "executor_class", executor_class)
        table = f"{lab.__name__}:Square"
        on_ray = ["--num-cpus", "2", "--num-gpus", "0.5", "--memory", "4GiB", "--resource", "camera=1"]
        assert run("populate", table, "-e", "ray", *on_ray).exit_code == 0
        monkeypatch.setattr(djdist.config, "executor", "dask")
        assert run("populate", table, "--resource", "GPU=1", "--resource", "A=B=2").exit_code == 0
        needs = {"num_cpus": 2, "num_gpus": 0.5, "memory": 4 * 2**30, "resources": {"camera": 1}}
        assert given == [
            ("ray", (None,), needs),
            ("dask", (None,), {"resources": {"GPU": 1, "A=B": 2}}),
        ]


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
        assert run("ignore", name, "subject_id = 1").stdout == "1 job is ignored from now on\n"
        lab.Fix.insert(lab.Session & "subject_id > 1", ignore_extra_fields=True)
        assert run("retry", name, "error_message LIKE 'ValueError%'").stdout.startswith(
            "2 errors are pending"
        )
        populated = run("populate", name)
        assert (populated.exit_code, populated.stdout) == (0, "2 made, 0 errors left\n")

    def test_those_of_a_module_are_listed_and_retried_at_once(self, lab: ModuleType, run: Djdist) -> None:
        pipelines.fill(lab, subjects=3, sessions=5)
        name, of_days = lab.__name__, "session_date > '1999-01-01'"
        assert run("errors", name).stdout == "No errors.\n"
        assert run("populate", f"{name}:Square", f"{name}:Renamed", f"{name}:Fragile").exit_code == 1
        assert run("errors", name).stdout.startswith("3 × Fragile: ValueError: bad n …\n    subject_id=")
        (cause,) = json.loads(run("errors", name, "--json").stdout)
        assert (cause["table"], cause["errors"]) == ("Fragile", 3)
        retried = json.loads(run("retry", f"{name}:Square", f"{name}:Renamed", of_days, "--json").stdout)
        assert retried == {"table": "Square", "retried": 0}  # the other one calls its days otherwise
        assert run("retry", name, of_days).stdout == "3 errors are pending again: 3 of Fragile\n"
        refused = run("retry", name, "sessiondate > '1999-01-01'")
        assert (refused.exit_code, "is no restriction" in refused.stderr) == (2, True)

    def test_a_job_that_is_reserved_meanwhile_is_not_ignored(self, lab: ModuleType, server: Server) -> None:
        pipelines.fill(lab)
        lab.Square.jobs.refresh()
        jobs, ignored = lab.Square.jobs, list[int]()
        with server.connect() as other:
            other.start_transaction()
            other.query(f"UPDATE {jobs.full_table_name} SET status = 'reserved' WHERE subject_id = 1")
            with meanwhile(lambda: ignored.append(jobs.ignore_where("TRUE"))):
                waits = LOCK_WAITS[server.backend].format(schema=lab.SCHEMA)
                wait_until(lambda: other.query(waits).fetchone()[0], "the lock")
                other.commit_transaction()
        assert ignored == [3]
        assert counts(lab.Square) == {"reserved": 3, "ignore": 3}
        with pytest.raises(djdist.OptionError, match="needs a restriction"):
            jobs.ignore_where()

    def test_only_the_last_errors_are_listed(
        self, lab: ModuleType, run: Djdist, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipelines.fill(lab, subjects=3, sessions=5)
        lab.Fragile.populate(reserve_jobs=True, suppress_errors=True)
        monkeypatch.setattr("djdist.jobs.history.LAST_ERRORS", 2)
        name = f"{lab.__name__}:Fragile"
        assert run("errors", name).stdout.startswith("The last 2 of 3 errors:\n2 × ValueError")
        listed = run("errors", name, "--json")
        assert "The last 2 of 3 errors:" in listed.stderr
        assert json.loads(listed.stdout)[0]["errors"] == 2

    def test_several_tables_are_one_run(self, lab: ModuleType, run: Djdist) -> None:
        pipelines.fill(lab)
        square, upstream = (f"{lab.__name__}:{name}" for name in ("Square", "Upstream"))
        forecast = json.loads(
            run("populate", upstream, square, "subject_id = 1", "--dry-run", "--json").stdout
        )
        assert [(row["table"], row["missing"], row["later"]) for row in forecast] == [
            ("Square", 3, 0),
            ("Upstream", 0, 3),
        ]
        shown = run("populate", upstream, "--upstream", "--dry-run").stdout
        assert [line.split()[:4] for line in shown.splitlines()[1:]] == [
            ["Square", "·", "6", "·"],
            ["Upstream", "·", "·", "6"],
        ]
        populated = run("populate", upstream, "subject_id = 1", "--upstream")
        told = "Square    3 made, 0 errors left\nUpstream  3 made, 0 errors left\n"
        assert (populated.exit_code, populated.stdout) == (0, told)
        populated = run("populate", square, upstream, "--order", "upstream", "--json")
        counts = {"made": 3, "failed": 0, "held_back": 0, "held_back_by": {}}
        left = {"error": 0, "pending": 0, "reserved": 0}
        tables = [{"table": name, **counts, **left} for name in ("Square", "Upstream")]
        told = json.loads(populated.stdout)
        assert all(table.pop("peak_memory") > 0 for table in told["tables"])
        assert told == {"made": 6, "tables": tables}

    def test_what_errors_hold_back_is_told(self, lab: ModuleType, run: Djdist) -> None:
        @dj.Schema(lab.SCHEMA)
        class Onward(dj.Computed):
            definition = "-> lab.Fragile"

            def make(self, key: dict[str, Any]) -> None:
                self.insert1(key)

        pipelines.fill(lab)
        lab.Onward = Onward  # type: ignore[attr-defined]
        populated = run("populate", f"{lab.__name__}:Onward", "--upstream")
        assert (populated.exit_code, populated.stdout.splitlines()) == (
            1,
            [
                "Fragile  5 made, 1 error left",
                "Onward   5 made, 0 errors left, held back: 1 by Fragile",
            ],
        )

    def test_keys_that_are_left_are_told(self, lab: ModuleType, run: Djdist) -> None:
        pipelines.fill(lab)
        populated = run("populate", f"{lab.__name__}:Square", "--max-calls", "1")
        assert (populated.exit_code, populated.stdout) == (0, "1 made, 0 errors left, 5 pending\n")
        change(lab.Square.jobs, "subject_id = 2", status="reserved", connection_id=ALIVE)
        populated = run("populate", f"{lab.__name__}:Square", "--json")
        told = {"table": "Square", "made": 2, "error": 0, "pending": 0, "reserved": 3}
        assert json.loads(populated.stdout) == told

    def test_what_is_done_is_told_in_json(self, lab: ModuleType, run: Djdist) -> None:
        pipelines.fill(lab)
        name = f"{lab.__name__}:Fragile"
        (refreshed,) = json.loads(run("refresh", name, "--json").stdout)
        assert (refreshed["table"], refreshed["added"]) == ("Fragile", 6)
        assert json.loads(run("rescue", name, "--json").stdout) == [{"table": "Fragile", "rescued": 0}]
        ignored = run("ignore", name, "subject_id = 1", "--json").stdout
        assert json.loads(ignored) == {"table": "Fragile", "ignored": 3}
        assert run("populate", name).exit_code == 1
        retried = run("retry", name, "--json").stdout
        assert json.loads(retried) == {"table": "Fragile", "retried": 1}

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
        pipelines.fill(lab, subjects=2, sessions=5)
        with dj.config.override(jobs__keep_completed=True):
            lab.Fragile.populate(reserve_jobs=True, suppress_errors=True)
        name, file = f"{lab.__name__}:Fragile", tmp_path / "report.html"
        assert run("report", name, "subject_id = 1", "--output", str(file)).stdout == f"{file}\n"
        assert "<title>Fragile: 4 made, 1 failed" in file.read_text()
        refused = run("report", name, "--output", str(file))
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert f"{file} exists already: give --overwrite" in refused.stderr
        assert run("report", name, "--output", str(file), "--overwrite").exit_code == 0
        other = tmp_path / "other.html"
        assert run("report", name, "subject_id = 1", str(other)).stdout == f"{other}\n"
        assert other.exists()
        assert "<title>Fragile: 8 made, 2 failed" in file.read_text()


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
        statuses = ["new", "pending", "reserved", "error", "ignore", "done", "total", "runs"]
        assert list(fragile[statuses]) == [0, 0, 9, 2, 3, 16, 30, 1]
        assert list(square[statuses]) == [20, 0, 0, 0, 0, 10, 30, 0]
        assert fragile["seconds_left"] == pytest.approx(9 / fragile["keys_per_second"])
        assert not Jobs(lab.Square()).is_declared
        heading, line = run("status", f"{lab.__name__}:Fragile").stdout.splitlines()
        assert heading.split()[:6] == ["table", "done", "%", "new", "pending", "reserved"]
        assert line.split()[:11] == ["Fragile", "16", "of", "30", "53", "%", "·", "·", "9", "2", "3"]

    def test_keys_without_a_job_are_new(self, lab: ModuleType) -> None:
        pipelines.fill(lab)
        assert list(djdist.progress(lab.Square)["new"]) == [6]
        lab.Square.jobs.refresh("subject_id = 1")
        assert list(djdist.progress(lab.Square)["new"]) == [3]
        lab.Square.populate(reserve_jobs=True)
        assert list(djdist.progress(lab.Square)["new"]) == [0]

    def test_a_job_whose_key_is_gone_or_made_hides_no_new_one(self, lab: ModuleType) -> None:
        pipelines.fill(lab, subjects=3)
        jobs = lab.Square.jobs
        jobs.refresh("subject_id < 3")
        assert jobs.ignore_where("subject_id = 1") == 3
        (lab.Session & "subject_id = 1").delete(prompt=False)
        lab.Square.populate("subject_id = 2")
        assert list(djdist.progress(lab.Square)["new"]) == [3]
        assert jobs.refresh()["added"] == 3
        assert list(djdist.progress(lab.Square)["new"]) == [0]

    def test_keys_whose_result_is_gone_are_new(self, lab: ModuleType) -> None:
        pipelines.fill(lab)
        with dj.config.override(jobs__keep_completed=True):
            lab.Square.populate(reserve_jobs=True)
            (lab.Square & "subject_id = 1").delete(prompt=False)
            assert list(djdist.progress(lab.Square)["new"]) == [3]
            assert lab.Square.jobs.refresh()["re_pended"] == 3
        assert list(djdist.progress(lab.Square)["new"]) == [0]

    def test_keys_that_share_a_job_are_new_together(self, lab: ModuleType) -> None:
        class Choice(dj.Lookup):
            definition = "choice : int32"
            contents = ((1,), (2,))

        class Chosen(dj.Computed):
            definition = """
            -> Session
            choice : int32
            """

            @property
            def key_source(self) -> Any:
                return lab.Session * Choice

            def make(self, key: dict[str, Any]) -> None:
                self.insert1(key)

        pipelines.fill(lab)
        schema = dj.Schema(lab.SCHEMA)
        schema(Choice)
        schema(Chosen, context={"Session": lab.Session})
        Jobs(Chosen()).refresh("subject_id = 1")
        assert list(djdist.progress(Chosen)["new"]) == [3]


class TestRates:
    """What `top` measures where no job tells it; it looks every two seconds."""

    def rates(self, looks: list[dict[str, int]]) -> list[float]:
        from djdist.cli.rates import Rates

        rates, unknown = Rates(), {"pending": 9, "reserved": 1, "keys_per_second": float("nan")}
        shown = [
            rates.fill(pd.DataFrame([unknown | look], index=["Square"]), now=2.0 * number)
            for number, look in enumerate(looks)
        ]
        return [float(frame["keys_per_second"].iloc[0]) for frame in shown]

    def test_are_those_of_the_last_minute(self) -> None:
        looks = [{"done": 2 * n if n < 50 else 100 + 20 * (n - 50), "runs": 1} for n in range(100)]
        rates = self.rates(looks)
        assert math.isnan(rates[0])
        assert [rates[look] for look in (1, 49, -1)] == [1, 1, 10]

    def test_are_unknown_where_nobody_populates(self) -> None:
        rates = self.rates([{"done": done, "runs": runs} for done, runs in ((0, 1), (4, 1), (6, 0), (6, 0))])
        assert rates[1] == 2
        assert all(map(math.isnan, rates[2:]))

    def test_begin_anew_with_a_run(self) -> None:
        looks = [{"done": 0, "runs": 0}] * 20 + [{"done": 8, "runs": 1}]
        assert self.rates(looks)[-1] == 4

    def test_leave_alone_what_jobs_tell(self) -> None:
        assert self.rates([{"done": done, "runs": 1, "keys_per_second": 5} for done in (0, 2)]) == [5, 5]


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
        ended = run("report", lab.__name__)
        assert ended.exit_code == 70
        assert "ZeroDivisionError" in ended.stderr

    def test_an_executor_that_there_is_not(self, run: Djdist) -> None:
        refused = run("populate", "my_pipeline:Table", "--executor", "slurm")
        assert refused.exit_code == 2
        assert all(name in refused.stderr for name in ("slurm", "local", "ray", "dask"))


LOCK_WAITS = {
    "mysql": "SELECT count(*) FROM information_schema.processlist "
    "WHERE LEFT(info, 6) = 'UPDATE' AND LOCATE('{schema}', info) > 0",
    "postgresql": "SELECT count(*) FROM pg_locks "
    "WHERE NOT granted AND transactionid = pg_current_xact_id()::xid",
}
MODULES = {"without_tables": "import datajoint", "broken": "1 / 0", "in_need": "import no_such_library"}
MISTAKES = {
    "status|no_such_module": "There is no module 'no_such_module' in this folder or installed",
    "status|without_tables.py": "my_pipeline for my_pipeline.py",
    "status|": "can't be imported: ValueError",
    "status|broken": "broken can't be imported: ZeroDivisionError: division by zero",
    "status|in_need": "No module named 'no_such_library'",
    "status|without_tables": "without_tables has no dj.Computed or dj.Imported tables",
    "populate|LAB|nonsense = 3": "No table of the run can be restricted by nonsense in its key source.",
    "populate|LAB:Square|LAB:Reading|--order|sideways": "order='sideways' must be 'downstream' or 'upstream'",
    "populate|LAB:Squares": "LAB has no table Squares. Its auto-populated tables are: Square, Reading",
    "populate|LAB:Session": "LAB:Session is not a dj.Computed or dj.Imported table",
    "errors|LAB:SCHEMA": "LAB:SCHEMA is not a dj.Computed or dj.Imported table",
    "populate|LAB:Square|nonsense = 3": "'nonsense = 3' is no restriction: ",
    "populate|LAB:Square|n = 1|subject_id =": "'n = 1 AND subject_id =' is no restriction: ",
    "refresh|LAB:Square|nonsense": "'nonsense' is no restriction: ",
    "populate|LAB:Square|--address|head:8786": "--address goes with --executor ray or --executor dask, not",
    "populate|LAB:Square|--num-gpus|1": "--num-gpus goes with --executor ray, not with 'local'",
    "populate|LAB:Square|-e|dask|--memory|4G": "--memory goes with --executor ray, not with 'dask'",
    "populate|LAB:Square|-e|ray|--memory|4X": "memory='4X' must be bytes, or a text such as",
    "populate|LAB:Square|-e|ray|--resource|camera": "--resource 'camera' must be NAME=N, such as camera=1",
    "runs": "is no cluster that lives longer than this call",
    "wait|396303eb|-e|local": "is no cluster that lives longer than this call",
    "populate|LAB:Square|--max-calls|-1": "max_calls=-1 must be a whole number from 0",
    "populate|LAB:Square|--detach": "is no cluster that lives longer than this call",
    "report|LAB|--output|report.pdf": "must end in .html or .png",
}


def test_without_typer_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from djdist.__main__ import main

    for name in [name for name in sys.modules if name.startswith("djdist.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith('djdist: the command line needs typer: pip install "')
    assert '"typer>=' in said
