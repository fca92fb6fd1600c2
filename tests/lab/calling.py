"""Callers of populate() as processes of their own, which can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lab.watching import SECONDS
from servers import Server

CONNECT = """
import time

import datajoint as dj
import djdist

database = dj.config.database
database.backend, database.host, database.port = {server.backend!r}, {server.host!r}, {server.port!r}
database.user, database.password = {server.user!r}, {server.password!r}
database.name, database.use_tls = {server.database_name!r}, False
djdist.enable()
"""
OF_TABLE = """
from {module} import Noted

def populate(**options):
    return Noted.populate(reserve_jobs=True, suppress_errors=True, make_kwargs={make_kwargs!r}, **options)

def jobs(*statuses):
    progress = Noted.jobs.progress()
    return sum(progress[status] for status in statuses)
"""
OF_PIPELINE = """
import {module} as whole

def populate(**options):
    options |= {{"reserve_jobs": True, "suppress_errors": True, "make_kwargs": {make_kwargs!r}}}
    return djdist.populate(whole, **options)

def jobs(*statuses):
    progress = [getattr(whole, name).jobs.progress() for name in {tables!r}]
    return sum(each[status] for each in progress for status in statuses)
"""
POPULATE = "print(populate({options}))"
FINISH = """
while populate()["success_count"] or jobs("pending", "reserved"):
    time.sleep(0.1)
"""
TAKE_OVER = """
held = Noted.jobs.reserved.to_dicts()
until = time.monotonic() + 5 * djdist.config.lease_seconds  # what is locked can't be taken over
while any(row in held for row in Noted.jobs.reserved.to_dicts()) and time.monotonic() < until:
    Noted.jobs.refresh()
    time.sleep(0.1)
populate(max_calls=10)
"""


@dataclass
class Caller:
    """A script that populates Noted, or a pipeline's tables; what it says goes to files in the folder."""

    server: Server
    module: str
    folder: Path
    make_kwargs: dict[str, Any]
    environment: dict[str, str]
    options: str = ""
    tables: tuple[str, ...] = ()
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list, init=False)

    def start(self, code: str = POPULATE) -> subprocess.Popen[bytes]:
        file = self._file(len(self._started))
        preamble = CONNECT + (OF_PIPELINE if self.tables else OF_TABLE)
        text = preamble.format(**vars(self))
        file.write_text(text + code.replace("{options}", self.options))
        with file.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, **self.environment},
            )
        self._started.append(process)
        return process

    def do(self, code: str) -> None:
        """Run other code over the same table to its end."""
        self.wait(self.start(code))

    def wait(self, process: subprocess.Popen[bytes], seconds: float = SECONDS) -> None:
        returncode = process.wait(seconds)
        assert returncode == 0, f"{process.args!r} ended with {returncode}:\n{self.log()}"

    def log(self) -> str:
        """Give the end of all that the latest scripts said."""
        return "\n".join(f"--- {number}\n{self.log_of(number)[-3000:]}" for number in self._latest(4))

    def log_of(self, number: int) -> str:
        return self._file(number).with_suffix(".log").read_text()

    def why(self, process: subprocess.Popen[bytes]) -> str:
        """Give the error that ended a script."""
        lines = self.log_of(self._started.index(process)).splitlines()
        return next((line for line in reversed(lines) if line.startswith("djdist.errors.")), lines[-1])

    def _latest(self, count: int) -> range:
        return range(max(0, len(self._started) - count), len(self._started))

    def _file(self, number: int) -> Path:
        return self.folder / f"call-{number}.py"

    def close(self) -> None:
        """Kill what still runs, with all that it started."""
        for process in self._started:
            if process.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.kill()
                process.wait()
