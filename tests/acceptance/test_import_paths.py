"""Workers on this machine import what the caller can, however it was started, and from whatever folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acceptance.conftest import PREAMBLE, end_with_children
from lab.watching import SECONDS
from servers import Server

PIPELINE = """
import datajoint as dj

schema = dj.Schema("{schema}")


@schema
class Number(dj.Lookup):
    definition = "n : int32"
    contents = [[n] for n in range(4)]


@schema
class Squared(dj.Computed):
    definition = '''
    -> Number
    ---
    result : int64
    '''

    def make(self, key):
        from its_functions import squared

        self.insert1({{**key, "result": squared(key["n"])}})
"""
FUNCTIONS = "def squared(n):\n    return n * n\n"
SCRIPT = """
from its_pipeline import Squared

print(Squared.populate(reserve_jobs=True{options})["success_count"], "made")
"""
WRONG = "raise ImportError('this is the wrong module')"
EXECUTORS = {"processes": "processes=2", "ray": "executor='ray'", "dask": "executor='dask'"}
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_agent_register_timeout_ms": "60000"}  # the machine may be busy
FINDER = """
import sys
from importlib.util import spec_from_file_location

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("its_pipeline", "its_functions"):
            return spec_from_file_location(name, f"{folder}/{{name}}.py")

sys.meta_path.append(Finder)
"""


class Project:
    """A pipeline in a folder of its own, and another current folder that holds wrong modules of its names."""

    def __init__(self, folder: Path, executor: str, preamble: str) -> None:
        self.source, self.elsewhere = folder / "source", folder / "elsewhere"
        self.executor, self._preamble = executor, preamble
        self.environment: dict[str, str] = {}
        for each in (self.source, self.elsewhere):
            each.mkdir()
        for name in ("its_pipeline.py", "its_functions.py"):
            (self.elsewhere / name).write_text(WRONG)

    def script(self, file: Path, *, before: str = "") -> Path:
        file.parent.mkdir(exist_ok=True)
        call = SCRIPT.format(options=f", {EXECUTORS[self.executor]}")
        file.write_text(f"{before}\n{self._preamble}\n{call}")
        return file


def beside_the_script(project: Project) -> list[str]:
    return [sys.executable, str(project.script(project.source / "call.py"))]


def appended_to_the_path(project: Project) -> list[str]:
    before = f"import sys\nsys.path.append({str(project.source)!r})"
    return [sys.executable, str(project.script(project.source.parent / "scripts" / "call.py", before=before))]


def module_of_a_package(project: Project) -> list[str]:
    project.script(project.source / "its_package" / "call.py")
    (project.source / "its_package" / "__init__.py").touch()
    project.environment["PYTHONPATH"] = os.pathsep.join(
        [str(project.source), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    for trap in project.elsewhere.iterdir():  # -m puts the current folder first
        trap.unlink()
    return [sys.executable, "-m", "its_package.call"]


def editable_install(project: Project) -> list[str]:
    """Give an environment of its own, on top of this one, a hook as that of `pip install -e`."""
    folder = project.source.parent / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    (packages / "its_finder.py").write_text(FINDER.format(folder=project.source))
    (packages / "its.pth").write_text("import its_finder\n")
    (packages / "under.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return [str(python), str(project.script(project.source.parent / "scripts" / "call.py"))]


def command_line(project: Project) -> list[str]:
    """Name the module to the command, which takes those of the current folder."""
    project.elsewhere = project.source
    how = ["--processes", "2"] if project.executor == "processes" else ["--executor", project.executor]
    return [sys.executable, "-m", "djdist", "populate", "its_pipeline:Squared", *how]


def notebook(project: Project) -> list[str]:
    """Execute a notebook beside the modules, whose folder is its kernel's current one."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cell = nbformat.v4.new_code_cell(project.script(project.source / "cell.txt").read_text())
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), project.source / "call.ipynb")
    execute = "import sys, nbclient.cli as cli; sys.argv[1:] = ['--output=done', 'call.ipynb']; cli.main()"
    show = "import json; print(json.load(open('done.ipynb'))['cells'][0]['outputs'])"
    project.elsewhere = project.source
    return [sys.executable, "-c", f"{execute}\n{show}"]


def of(server: Server) -> dict[str, str]:
    """Give a process the server, where its code says nothing of it."""
    settings = {"DJ_BACKEND": server.backend, "DJ_HOST": server.host, "DJ_PORT": str(server.port)}
    return {**settings, "DJ_USER": server.user, "DJ_PASS": server.password}


@pytest.mark.long_on("ray")
@pytest.mark.long_on("dask")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    "way",
    [
        beside_the_script,
        *(
            pytest.param(way, marks=pytest.mark.long)
            for way in (
                appended_to_the_path,
                module_of_a_package,
                editable_install,
                command_line,
                notebook,
            )
        ),
    ],
    ids=lambda way: way.__name__,
)
def test_workers_find_the_pipeline(
    connection: Any,
    server: Server,
    schema_name: str,
    modules_folder: Path,
    tmp_path: Path,
    executor: str,
    way: Callable[[Project], list[str]],
) -> None:
    project = Project(tmp_path, executor, PREAMBLE.format(server=server))
    (project.source / "its_pipeline.py").write_text(PIPELINE.format(schema=schema_name))
    (project.source / "its_functions.py").write_text(FUNCTIONS)
    command = way(project)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=project.elsewhere,
        env={**os.environ, **RAY, **of(server), **project.environment},
    )
    try:
        output, error = process.communicate(timeout=SECONDS)
    finally:
        end_with_children(process)
    assert "4 made" in output, error + output
