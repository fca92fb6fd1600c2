"""What tests let the make() of Scripted do before it inserts; files tell what has begun and when to go on."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import datajoint as dj

from djdist.database import dbapi, silence
from djdist.shipping.packing import open_dbapi_connection, settings_of

Key = dict[str, Any]
GATE = "gate"
THREADS = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
IMPATIENT = {
    "mysql": "SET SESSION innodb_lock_wait_timeout = 1",
    "postgresql": "SET lock_timeout = '100ms'",
}
COLLATIONS = ", ".join(f"information_schema.collations AS {name}" for name in "abcd")
LIMITED = {
    "max_statement_time": ("SET SESSION max_statement_time = 0.2", "SELECT SLEEP(20)"),
    # on MySQL it lets SLEEP end early, but as if nothing had happened
    "max_execution_time": ("SET SESSION max_execution_time = 200", f"SELECT count(*) FROM {COLLATIONS}"),
    "statement_timeout": ("SET statement_timeout = 200", "SELECT pg_sleep(20)"),
}
SLEEP = {"mysql": "SELECT SLEEP({})", "postgresql": "SELECT pg_sleep({})"}


def begun(folder: Path) -> list[int]:
    """Give the sessions whose make() has begun, as often as it has."""
    return sorted(int(file.name.split("-")[0]) for file in folder.glob("*-begun-*"))


def open_gate(folder: Path) -> None:
    (folder / GATE).touch()


def open_own_gates(folder: Path, sessions: Iterable[int]) -> None:
    for n in sessions:
        (folder / f"{GATE}-{n}").touch()


def nothing(table: dj.Table, key: Key, n: int) -> None:
    pass


def note_limits_of_threads(table: dj.Table, key: Key, n: int, folder: str) -> None:
    (Path(folder) / f"limits-{n}").write_text(" ".join(os.environ.get(name, "none") for name in THREADS))


def interrupt_itself(table: dj.Table, key: Key, n: int) -> None:
    signal.raise_signal(signal.SIGINT)


def wait_at_gate(table: dj.Table, key: Key, n: int, folder: str) -> None:
    _begin(n, folder)
    while not (Path(folder) / GATE).exists():
        time.sleep(0.01)


def wait_at_own_gate(table: dj.Table, key: Key, n: int, folder: str) -> None:
    _begin(n, folder)
    while not (Path(folder) / f"{GATE}-{n}").exists():
        time.sleep(0.01)


def load_model(table: dj.Table, key: Key, n: int, folder: str) -> None:
    """Load what stands for a model: it takes long, and a process does it once."""
    _begin(n, folder)
    _model(folder)


@cache
def _model(folder: str) -> None:
    with (Path(folder) / f"model-{os.getpid()}").open("a") as loads:
        loads.write("loaded\n")


def load_model_and_wait_at_gate(table: dj.Table, key: Key, n: int, folder: str) -> None:
    load_model(table, key, n, folder)
    wait_at_gate(table, key, n, folder)


def models(folder: Path) -> dict[int, int]:
    """Return how often each process has loaded its model."""
    files = folder.glob("model-*")
    return {int(file.name.split("-")[1]): len(file.read_text().splitlines()) for file in files}


def wait_at_gate_in_a_shared_transaction(table: dj.Table, key: Key, n: int, folder: str) -> None:
    """Wait at the gate where the key that this process made before is not committed yet."""
    before = _made_before.get(folder)
    _made_before[folder] = key
    if before and not _is_seen_by_others(table, before):
        wait_at_gate(table, key, n, folder)


_made_before: dict[str, Key] = {}


def _is_seen_by_others(table: dj.Table, key: Key) -> bool:
    other = open_dbapi_connection(settings_of(table.connection))
    cursor = other.cursor()
    where = " AND ".join(f"{name} = %s" for name in key)
    cursor.execute(f"SELECT 1 FROM {table.full_table_name} WHERE {where}", list(key.values()))
    found = bool(cursor.fetchall())
    other.close()
    return found


def wait_at_gate_and_take_a_while(table: dj.Table, key: Key, n: int, folder: str) -> None:
    wait_at_gate(table, key, n, folder)
    time.sleep(0.2)


def wait_for_a_renewal(table: dj.Table, key: Key, n: int) -> None:
    """Wait until the run has renewed the lease of this job."""
    other = open_dbapi_connection(settings_of(table.connection))
    where = " AND ".join(f"{name} = %s" for name in key)
    jobs = table.connection.adapter.make_full_table_name(table.database, f"~~{table.table_name.lstrip('_')}")
    renewed: set[Any] = set()
    while len(renewed) < 2:
        time.sleep(0.05)
        cursor = other.cursor()
        cursor.execute(f"SELECT reserved_time FROM {jobs} WHERE {where}", list(key.values()))
        renewed |= set(cursor.fetchall())
    other.close()


def check_time_zone(table: dj.Table, key: Key, n: int, expected: str) -> None:
    assert table.connection.query("SHOW TimeZone").fetchone() == (expected,)


def idle_until_the_session_ends(table: dj.Table, key: Key, n: int, folder: str) -> None:
    _begin(n, folder)
    mysql = table.connection.adapter.backend == "mysql"
    session = table.connection.query(
        f"SELECT {'connection_id()' if mysql else 'pg_backend_pid()'}"
    ).fetchone()
    sessions = "information_schema.processlist WHERE id" if mysql else "pg_stat_activity WHERE pid"
    there = True
    while there:
        time.sleep(0.05)
        other = open_dbapi_connection(settings_of(table.connection))
        cursor = other.cursor()
        cursor.execute(f"SELECT 1 FROM {sessions} = %s", session)
        there = bool(cursor.fetchall())
        other.close()


def exceed_a_limit(table: dj.Table, key: Key, n: int, folder: str, limit_name: str) -> None:
    _begin(n, folder)
    limit, long_statement = LIMITED[limit_name]
    table.connection.query(limit)
    table.connection.query(long_statement)


def keep_the_processor_busy(table: dj.Table, key: Key, n: int, folder: str, seconds: float) -> None:
    """Do so for some time, and until others have looked at the job often enough."""
    _begin(n, folder)
    until, looked = time.monotonic() + seconds, Path(folder) / "looked"
    while time.monotonic() < until or not looked.exists():
        sum(range(1000))


def change_its_session(table: dj.Table, key: Key, n: int, folder: str) -> None:
    """Lock the session's row, with no patience for others that have."""
    table.connection.query(IMPATIENT[table.connection.adapter.backend])
    change_its_session_with_patience(table, key, n, folder)


def change_its_session_with_patience(table: dj.Table, key: Key, n: int, folder: str) -> None:
    _begin(n, folder)
    session = sys.modules[type(table).__module__].Session
    table.connection.query(f"UPDATE {session().full_table_name} SET n = n WHERE n = %s", args=(n,))


def be_overtaken(table: dj.Table, key: Key, n: int) -> None:
    """Let somebody else insert this key's row first."""
    other = open_dbapi_connection(settings_of(table.connection))
    row = {**key, "pid": 0}
    names, marks = ", ".join(row), ", ".join(["%s"] * len(row))
    sql = f"INSERT INTO {table.full_table_name} ({names}) VALUES ({marks})"
    other.cursor().execute(sql, list(row.values()))
    other.commit()
    other.close()


def sleep_in_the_database(table: dj.Table, key: Key, n: int, folder: str) -> None:
    _begin(n, folder)
    table.connection.query(SLEEP[table.connection.adapter.backend].format(2))


def sleep_for_long_in_the_database(table: dj.Table, key: Key, n: int, folder: str) -> None:
    _begin(n, folder)
    table.connection.query(SLEEP[table.connection.adapter.backend].format(600))


def wait_at_gate_and_soon_doubt_the_database(table: dj.Table, key: Key, n: int, folder: str) -> None:
    dbapi.TIMEOUT_SECONDS, silence.DOUBT_SECONDS = 2, 0.5
    silence.ASK_SECONDS, silence.CERTAIN_SECONDS = 0.2, 1.0
    wait_at_gate(table, key, n, folder)


def raise_error_of_the_pipeline(table: dj.Table, key: Key, n: int) -> None:
    raise sys.modules[type(table).__module__].PipelineError(n, "the pipeline's own")


def fail_the_first_time(table: dj.Table, key: Key, n: int, folder: str) -> None:
    _begin(n, folder)
    if begun(Path(folder)).count(n) == 1:
        raise ConnectionRefusedError(f"session {n} is not there yet")


def exit_python(table: dj.Table, key: Key, n: int) -> None:
    sys.exit(f"session {n} is the end")


def raise_at_the_first_while_others_run(table: dj.Table, key: Key, n: int, folder: str) -> None:
    """Fail at session 1 when another one has begun; that one waits at the gate."""
    if n != 1:
        wait_at_gate(table, key, n, folder)
        return
    _begin(n, folder)
    while len(begun(Path(folder))) < 2:
        time.sleep(0.01)
    raise ValueError("the first fails")


def die_at_the_first_while_others_run(table: dj.Table, key: Key, n: int, folder: str) -> None:
    """Kill the worker of session 1 each time, as soon as another one has begun; those take longer."""
    _begin(n, folder)
    if n == 1:
        while set(begun(Path(folder))) == {1}:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)


def die_at_the_first(table: dj.Table, key: Key, n: int, folder: str) -> None:
    _begin(n, folder)
    if n == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def die_at(table: dj.Table, key: Key, n: int, folder: str, number: int) -> None:
    _begin(n, folder)
    if n == number:
        os.kill(os.getpid(), signal.SIGKILL)


def never_end_at(table: dj.Table, key: Key, n: int, folder: str, number: int) -> None:
    _begin(n, folder)
    while n == number:
        time.sleep(0.05)


def insert_and_wait_at_gate(table: dj.Table, key: Key, n: int, folder: str) -> None:
    """Insert a row of another session's key first, so that a half-done make() would show."""
    table.insert1({**key, "pid": 0})
    wait_at_gate(table, key, n, folder)


def lock_the_row_and_hang_the_first_time(table: dj.Table, key: Key, n: int, folder: str) -> None:
    _begin(n, folder)
    if begun(Path(folder)).count(n) == 1:
        table.insert1({**key, "pid": 0})
        (Path(folder) / "locked").touch()
        time.sleep(600)


def never_end_at_the_first(table: dj.Table, key: Key, n: int, folder: str) -> None:
    _begin(n, folder)
    while n == 1:
        time.sleep(0.05)


def never_end_before_the_last(table: dj.Table, key: Key, n: int, folder: str, last: int) -> None:
    _begin(n, folder)
    while n < last:
        time.sleep(0.05)


def hold_the_interpreter_at_the_first(table: dj.Table, key: Key, n: int, folder: str) -> None:
    """Never end, in code that lets no other thread run: a search that backtracks for ever."""
    _begin(n, folder)
    if n == 1:
        re.match(r"(a+)+$", "a" * 64 + "b")


def raise_a_long_message(table: dj.Table, key: Key, n: int) -> None:
    raise ValueError("long " * 2_000_000)


def print_without_end(table: dj.Table, key: Key, n: int) -> None:
    for line in range(20_000):
        print("line", line, "of session", n)
        print("line", line, "of session", n, file=sys.stderr)


def use_processes(table: dj.Table, key: Key, n: int) -> None:
    """Compute in a pool of processes, as many pipelines do."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]


def spawn_processes(table: dj.Table, key: Key, n: int) -> None:
    """Compute in processes that are no forks, as what uses a GPU has to."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]


def fork_by_hand(table: dj.Table, key: Key, n: int) -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def close_the_connection(table: dj.Table, key: Key, n: int) -> None:
    if n == 1:
        table.connection.close()


def leave_a_lock_and_a_transaction(table: dj.Table, key: Key, n: int) -> None:
    """Fail at session 1 with a lock held that all other sessions need."""
    mysql = table.connection.adapter.backend == "mysql"
    lock = "SELECT GET_LOCK('djdist', 0)" if mysql else "SELECT pg_try_advisory_lock(7)"
    until = time.monotonic() + 5  # another worker may have it for a moment
    while not table.connection.query(lock).fetchone()[0]:
        assert time.monotonic() < until
        time.sleep(0.01)
    if n == 1:
        table.insert1({**key, "pid": 0})
        raise ValueError("the lock stays")
    table.connection.query("SELECT RELEASE_LOCK('djdist')" if mysql else "SELECT pg_advisory_unlock(7)")


def _begin(n: int, folder: str) -> None:
    (Path(folder) / f"{n}-begun-{os.getpid()}-{time.monotonic_ns()}").touch()
