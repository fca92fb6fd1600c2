"""Who makes the keys of the benchmarked table: each a script of its own, as a lab would run it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from servers import Server

PIPELINE = '''
import os
import time

import datajoint as dj

schema = dj.Schema("{schema}")


@schema
class Number(dj.Manual):
    definition = """
    n : int32
    ---
    x : int32
    """


@schema
class Doubled(dj.Computed):
    definition = """
    -> Number
    ---
    y : int32
    made_at = 0 : float64
    """

    def make(self, key):
        self.insert1({{**key, "y": 2 * int((Number & key).fetch1("x")), "made_at": time.time()}})


@schema
class Quadrupled(dj.Computed):
    definition = """
    -> Doubled
    ---
    z : int32
    """

    def make(self, key):
        self.insert1({{**key, "z": 2 * int((Doubled & key).fetch1("y"))}})


@schema
class Napped(dj.Computed):
    definition = """
    -> Number
    ---
    began : float64
    ended : float64
    pid : int64
    """

    def make(self, key):
        began = time.time()
        time.sleep(0.1)
        self.insert1({{**key, "began": began, "ended": time.time(), "pid": os.getpid()}})
'''
PREAMBLE = """
import datajoint as dj

database = dj.config.database
database.backend, database.host, database.port = {server.backend!r}, {server.host!r}, {server.port!r}
database.user, database.password = {server.user!r}, {server.password!r}
database.name, database.use_tls = {server.database_name!r}, False
dj.logger.setLevel("ERROR")

from {module} import *
"""
BARE = """
from multiprocessing import Barrier, Process

def make(keys, start):
    connection = Doubled.connection
    connection.connect()
    Doubled._allow_insert = True
    start.wait()
    for key in keys:
        with connection.transaction:
            Doubled().make(key)

keys = Number.keys()
start = Barrier({workers})
processes = [Process(target=make, args=(keys[i::{workers}], start)) for i in range({workers})]
for process in processes:
    process.start()
for process in processes:
    process.join()
"""
NATIVE_WORKERS = """
from multiprocessing import Process

def work():
    Doubled.connection.connect()
    Doubled.populate(reserve_jobs=True)

processes = [Process(target=work) for _ in range({workers})]
for process in processes:
    process.start()
for process in processes:
    process.join()
"""
NATIVE = "Doubled.populate(reserve_jobs=True, processes={workers})"
DJDIST = """
import djdist

djdist.enable()
with djdist.{executor} as executor:
    Napped.populate("n < {naps}", reserve_jobs=True, executor=executor)
    Doubled.populate("n < {warm_up}", reserve_jobs=True, executor=executor, keys_per_transaction={several})
    Doubled.populate(reserve_jobs=True, executor=executor, keys_per_transaction={several})
"""
EXECUTORS = {"local": "LocalExecutor({workers})", "ray": "RayExecutor()", "dask": "DaskExecutor()"}


def _djdist(executor: str, several: str) -> str:
    return DJDIST.replace("{executor}", executor).replace("{several}", several)


SCRIPTS = {
    "bare make": BARE,
    "native": NATIVE,
    **{name: _djdist(executor, "1") for name, executor in EXECUTORS.items()},
    **{f"{name}, shared transactions": _djdist(executor, "'auto'") for name, executor in EXECUTORS.items()},
}
CONTESTANTS = tuple(SCRIPTS)
SCRIPTS["native workers"] = NATIVE_WORKERS
WARM_UP = 200
"""So many keys are made first, and not timed: clusters are warm before they are used."""
NAPS = 80
"""So many long keys before those let every worker take part in that, not the first one alone."""

Case = TypeVar("Case")


@dataclass(frozen=True)
class Bench:
    """A table to fill again and again."""

    server: Server
    module: str
    folder: Path
    environment: dict[str, str]

    def make(self, contestant: str, workers: int, naps: int = 0) -> None:
        """Let a contestant make all keys that there are."""
        self.run(SCRIPTS[contestant].format(workers=workers, warm_up=WARM_UP, naps=naps))

    def run(self, code: str) -> str:
        """Run code with the benchmark's tables as a script, and give what it printed."""
        script = self.folder / "benchmarked.py"
        script.write_text(PREAMBLE.format(server=self.server, module=self.module) + code)
        environment = {**os.environ, **self.environment}
        command = [sys.executable, str(script)]
        return subprocess.run(
            command, cwd=self.folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout


def in_another_order(number: int, cases: Iterable[Case]) -> list[Case]:
    """Give what is measured as a round meets it, since each leaves its server something to clean up."""
    known = list(cases)
    return random.Random(number).sample(known, len(known))


def jobs_per_second(lab: ModuleType) -> float:
    """Tell how fast the results came from warm workers, from the first to the last one."""
    times = (lab.Doubled & f"n >= {WARM_UP}").to_arrays("made_at", order_by="made_at")
    return float((len(times) - 1) / (times[-1] - times[0]))


def empty(lab: ModuleType) -> None:
    lab.Napped.delete_quick()
    lab.Doubled.delete_quick()
    lab.Doubled.jobs.delete_quick()


def questions(connection: Any) -> int:
    """Count the statements that a MySQL or MariaDB server has been sent since its start."""
    (_, count) = connection.query("SHOW GLOBAL STATUS LIKE 'Questions'").fetchone()
    return int(count)
