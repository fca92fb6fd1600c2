"""Where workers look for modules: as their caller does, if they are on the same machine."""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from djdist._job import Job, Report, TaskFunction

SENT_ALONG = ("working_dir", "py_modules", "excludes", "java_jars")
"""Parts of a runtime environment that Ray sends from here only as it connects."""


@dataclass(frozen=True)
class Caller:
    """The Python of who calls, and where it looks for modules."""

    host: str = ""
    prefix: str = ""
    paths: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> "Caller":
        return cls(platform.node(), sys.prefix, tuple(path or os.getcwd() for path in sys.path))


@dataclass(frozen=True)
class FindingModules:
    """A task function whose modules are looked for as at the caller, where that runs on the same machine.

    Ray lets workers look first into the caller's current folder, where Python itself doesn't look, and not at
    all where the caller has appended a path. What a runtime environment sends along comes first.
    """

    caller: Caller
    work: TaskFunction

    def __call__(self, jobs: Sequence[Job]) -> Report:
        here, given = Caller.here(), ray.get_runtime_context().runtime_env
        is_same_python = (here.host, here.prefix) == (self.caller.host, self.caller.prefix)
        if is_same_python and not any(map(given.get, SENT_ALONG)):
            sys.path[:] = [*self.caller.paths, *(path for path in sys.path if path not in self.caller.paths)]
        return self.work(jobs)
