"""Processes of this machine, which are forked from a server that has imported what they need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from djdist.executors.local import fork_server, forks
from djdist.executors.local.process import Process
from lab.watching import SECONDS, wait_until

Born = Callable[..., Process]
PID = "__import__('os').getpid()"
PARENT = "__import__('os').getppid()"
IN_A_FORK = """
import os
from djdist.executors.local.process import Process

def answer():
    process = Process(1)
    try:
        return process.submit(eval, "2 + 2").result(60)
    finally:
        process.end()

assert answer() == 4
child = os.fork()
if not child:
    os._exit(answer())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
"""
OPEN_ALL_THE_WAY = """
import gc
from djdist.executors.local.process import Process

processes = [Process(threads) for threads in (1, 2, 3, 1)]
for process in processes[:2]:
    assert process.submit(eval, "2 + 2").result(60) == 4
for process in processes:
    process.end()
del process, processes
gc.collect()
"""
LEAVING = """
import os
from djdist.executors.local.process import Process

process = Process(1)
pid = process.submit(eval, "__import__('os').getpid()").result(60)
print(pid, process._fork._server._process.pid, flush=True)
{then}
"""


@pytest.fixture
def born() -> Iterator[Born]:
    """Starts processes, and ends them."""
    processes: list[Process] = []

    def born(threads: int = 1) -> Process:
        processes.append(Process(threads))
        return processes[-1]

    yield born
    for process in processes:
        process.end()


def said(process: Process, expression: str) -> Any:
    """Give what an expression is worth in a process."""
    return process.submit(eval, expression).result(SECONDS)  # type: ignore[arg-type]


def test_they_share_their_server_and_no_number_by_chance(born: Born) -> None:
    one, other = born(), born()
    for drawn in ("__import__('numpy').random.random()", "__import__('random').random()"):
        assert said(one, drawn) != said(other, drawn)
    assert said(one, PARENT) == said(other, PARENT) != os.getpid()


def test_they_are_born_into_what_holds_now(
    born: Born, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(born(), "__import__('os').environ.get('DJDIST_TEST_NEW')") is None
    monkeypatch.setenv("DJDIST_TEST_NEW", "set since")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # Dask sets it in the process of its tests
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), tmp_path])
    later = born(2)
    assert said(later, "__import__('os').environ['DJDIST_TEST_NEW']") == "set since"
    assert said(later, "__import__('os').environ['OMP_NUM_THREADS']") == "2"
    assert said(later, "__import__('os').getcwd()") == str(tmp_path)
    assert str(tmp_path) in said(later, "__import__('sys').path")


def test_a_variable_that_no_import_reads_needs_no_new_server(
    born: Born, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN", "1")
    earlier = born()
    assert said(earlier, "__import__('os').environ['RUN']") == "1"
    monkeypatch.delenv("RUN")
    later = born()
    assert "RUN" not in said(later, "dict(__import__('os').environ)")
    assert said(later, PARENT) == said(earlier, PARENT)


def test_a_folder_that_was_made_again_is_theirs(
    born: Born, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        (tmp_path / "same").mkdir()
        monkeypatch.chdir(tmp_path / "same")
        assert said(born(), "__import__('os').getcwd()") == str(tmp_path / "same")
        (tmp_path / "same").rmdir()


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_their_files_get_the_rights_that_the_callers_get(born: Born, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert said(born(), "__import__('os').umask(0)") == umask
    finally:
        os.umask(before)


def test_the_callers_arguments_may_be_long(born: Born, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["name", "\udcffargument" * 20_000])
    process = born()
    assert said(process, "__import__('sys').argv") == sys.argv
    assert said(process, "__import__('os').path.realpath('/dev/stdin')") == os.devnull


def test_nothing_of_the_users_is_in_them(born: Born) -> None:
    process = born()
    loaded = said(process, "sorted(__import__('sys').modules)")
    assert "djdist.worker" in loaded
    assert not [name for name in loaded if name.startswith(("lab", "tests", "matplotlib", "sqlalchemy"))]
    assert said(process, "__import__('datajoint').instance._singleton_connection") is None
    threads = said(process, "[t.name for t in __import__('threading').enumerate()]")
    assert threads == ["MainThread", "djdist-parent"]


def test_output_goes_where_the_callers_goes_now(born: Born, capfd: pytest.CaptureFixture[str]) -> None:
    said(born(), "print('from a worker')")
    assert "from a worker" in capfd.readouterr().out


def test_one_that_was_killed_while_it_was_idle_is_replaced(born: Born) -> None:
    process = born()
    pid = said(process, PID)
    psutil.Process(pid).kill()
    wait_until(lambda: process._fork.has_ended, "its end")
    assert said(process, PID) != pid


@pytest.mark.parametrize("may_fork", [True, False])
def test_one_that_is_killed_at_its_work_is_told_from_one_that_left(
    born: Born, may_fork: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "MAY_FORK", may_fork)
    monkeypatch.setenv("DJDIST_TEST_MAY_FORK", str(may_fork))
    killed, left = born(), born()
    with pytest.raises(BrokenExecutor, match="by SIGKILL"):
        said(killed, f"__import__('os').kill({PID}, 9)")
    with pytest.raises(BrokenExecutor, match="with exit code 3"):
        said(left, "__import__('os')._exit(3)")
    assert killed.was_killed
    assert not left.was_killed


def test_where_no_process_may_be_forked_each_is_started(born: Born, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "MAY_FORK", False)
    monkeypatch.setenv("DJDIST_TEST_MAY_FORK", "False")
    one, other = born(), born()
    assert said(one, PID) != said(other, PID)
    assert said(one, PARENT) == said(other, PARENT) == os.getpid()
    psutil.Process(one.pid).kill()
    wait_until(lambda: not psutil.pid_exists(one.pid), "its end")
    assert said(one, "2 + 2") == 4
    other.end()
    assert not psutil.pid_exists(other.pid)


def test_a_server_that_has_ended_is_no_zombie(born: Born) -> None:
    server = said(born(), PARENT)
    psutil.Process(server).kill()
    wait_until(lambda: not psutil.pid_exists(server), "its end")


def test_a_server_ends_when_it_has_had_no_process_for_long(
    born: Born, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = "import socket, djdist.executors.local.fork_server as server; server.IDLE_SECONDS = 1"
    monkeypatch.setattr(forks, "CODE", forks.CODE.replace("import socket", soon))
    monkeypatch.setenv("DJDIST_TEST_IDLE", "1")
    process = born()
    pid, server = said(process, PID), said(process, PARENT)
    said(process, "__import__('time').sleep(2.5)")
    assert (said(process, PID), said(process, PARENT)) == (pid, server)
    process.end()
    wait_until(lambda: not psutil.pid_exists(server), "its end")


def test_what_takes_long_is_looked_at_once_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(fork_server, "IMPORTED", ())
    monkeypatch.setattr(fork_server, "_files", lambda: looks.append(1))
    monkeypatch.setattr("gc.freeze", lambda: None)
    imported = fork_server._Imported()
    for slow, looked in (SECONDS, 3), (-1, 4), (-1, 4):
        monkeypatch.setattr(fork_server, "SLOW_SECONDS", slow)
        monkeypatch.setattr(fork_server, "CHECK_SECONDS", SECONDS)
        assert all(imported.is_as_it_was() for _ in range(2))
        assert len(looks) == looked


def test_nothing_that_they_need_stays_open() -> None:
    command = [
        sys.executable,
        "-X",
        "dev",
        "-W",
        "ignore",
        "-W",
        "always::ResourceWarning",
        "-c",
        OPEN_ALL_THE_WAY,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    assert not done.stderr


def test_a_server_that_was_killed_is_replaced_and_its_processes_end(born: Born) -> None:
    process = born()
    pid = said(process, PID)
    process._fork._server._process.kill()
    wait_until(lambda: not psutil.pid_exists(pid), "its end")
    assert said(born(), "2 + 2") == 4


def test_a_server_whose_code_was_changed_forks_no_more(
    born: Born, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    deepdiff = tmp_path / "deepdiff.py"  # stands for a library that the server imports
    deepdiff.write_text("version = 1")
    version, earlier = "__import__('deepdiff').version", born()
    assert said(earlier, version) == 1
    deepdiff.write_text("version = 2  # longer")
    assert said(born(), version) == 2
    assert said(earlier, version) == 1


def test_a_fork_of_the_caller_has_a_server_of_its_own() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", IN_A_FORK], check=True, timeout=SECONDS)


@pytest.mark.parametrize(
    "then",
    ["", "os._exit(0)", "os.kill(os.getpid(), 9)", "process.submit(eval, '__import__(\"time\").sleep(600)')"],
)
def test_nothing_is_left_of_them_whatever_ends_the_caller(then: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", LEAVING.format(then=then)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS).stdout
    for pid in map(int, said.split()):
        wait_until(lambda: not psutil.pid_exists(pid), "its end")  # noqa: B023
