"""The code in README.md and docs/, and what of it can be run here.

``python -m lab.snippets`` runs the Python of all pages, each page from top to bottom, on an embedded
database with the pipeline that they speak of, and writes what went wrong as JSON. A comment
``<!-- not run: why -->`` in the line before a block spares it; it is checked all the same.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?P<spared><!-- not run: [^\n]* -->\n)?"
    r"^(?P<indent> *)(?P<statements>```+)(?P<language>[^\n`]*)\n(?P<code>.*?)^ *(?P=statements)$",
    re.MULTILINE | re.DOTALL,
)
SHELL = {"", "bash", "console", "sh"}
HERE = {r'executor="(ray|dask)"': 'executor="local"', r"processes=\d+": "processes=1"}
"""What pages say, and what takes its place where they are run."""
SECONDS = 60

PIPELINE = '''
import datajoint as dj

schema = dj.Schema("my_pipeline")


@schema
class Subject(dj.Lookup):
    definition = """
    subject_id : int32
    ---
    rig : varchar(8)
    """
    contents = [(1, "east"), (2, "west"), (3, "east")]


@schema
class Segmentation(dj.Computed):
    definition = """
    -> Subject
    ---
    cells : int32
    """

    def make(self, key):
        self.insert1({**key, "cells": key["subject_id"]})


@schema
class Statistics(dj.Computed):
    definition = """
    -> Segmentation
    ---
    mean : float64
    """

    def make(self, key):
        self.insert1({**key, "mean": (Segmentation & key).fetch1("cells") / 2})


@schema
class Stats(dj.Computed):
    definition = """
    -> Subject
    """

    def make(self, key):
        self.insert1(key)
'''


@dataclass(frozen=True)
class Snippet:
    """A block of code in a page, and whether it can be run here."""

    page: Path
    line: int
    language: str
    code: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    """Return the blocks of a page."""
    text = page.read_text()
    return [
        Snippet(
            page,
            text.count("\n", 0, found.start("code")) + 1,
            found["language"],
            re.sub(rf"^{found['indent']}", "", found["code"], flags=re.M),
            not found["spared"],
        )
        for found in BLOCK.finditer(text)
    ]


def mistakes(snippet: Snippet) -> Iterator[str]:
    """Yield which names of djdist in a block of Python do not exist, and which arguments."""
    for node in ast.walk(ast.parse(snippet.code, str(snippet))):
        if isinstance(node, ast.Attribute) and _is_of_djdist(node):
            try:
                _meant(node)
            except AttributeError as error:
                yield f"{snippet}: {error}"
        if isinstance(node, ast.Call):
            yield from (f"{snippet}: {argument}= in {ast.unparse(node)}" for argument in _unknown(node))


def _is_of_djdist(node: ast.expr) -> bool:
    return re.fullmatch(r"djdist(\.\w+)+", ast.unparse(node)) is not None


def _meant(node: ast.expr) -> Any:
    if isinstance(node, ast.Attribute):
        return getattr(_meant(node.value), node.attr)
    return __import__("djdist")


def _unknown(call: ast.Call) -> set[str]:
    """Return the keyword arguments that a function of djdist or ``populate()`` doesn't take."""
    import djdist

    if _is_of_djdist(call.func):
        called = _meant(call.func)
    elif ast.unparse(call.func).endswith(".populate"):
        called = djdist.populate
    else:
        return set()
    takes = inspect.signature(called).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in takes):
        return set()
    return {each.arg for each in call.keywords if each.arg} - {each.name for each in takes}


def commands(snippet: Snippet) -> Iterator[list[str]]:
    """Yield the arguments with which a block of shell calls djdist."""
    for line in re.sub(r"\\\n", " ", snippet.code).splitlines():
        called = re.search(r"(?:^|[\s/])djdist (?P<arguments>[a-z].*)", line.removeprefix("$ "))
        if called:
            arguments = shlex.split(called["arguments"], comments=True)
            ends = [place for place, word in enumerate(arguments) if word in {"|", ">", "&&", "&", ";"}]
            yield arguments[: min(ends, default=len(arguments))]


def main() -> None:
    """Run all pages."""
    import djdist

    signal.signal(signal.SIGALRM, _stop)
    with tempfile.TemporaryDirectory(prefix="snippets-", ignore_cleanup_errors=True) as folder:
        sys.path.insert(0, folder)
        (Path(folder) / "my_pipeline.py").write_text(PIPELINE)
        djdist.embedded(Path(folder) / "database")
        for name in ("DaskExecutor", "RayExecutor"):
            setattr(djdist, name, lambda *_, **__: djdist.LocalExecutor(processes=1))
        json.dump({str(page): said for page in PAGES if (said := _run(page))}, sys.stdout)


def _run(page: Path) -> str:
    """Run a page, and return what went wrong."""
    _start_afresh()
    namespace: dict[str, Any] = {"__name__": "snippet"}
    signal.alarm(SECONDS)
    try:
        with redirect_stdout(sys.stderr):
            for snippet in snippets(page):
                if snippet.language == "python" and snippet.runs:
                    exec(compile(_fit_for_here(snippet), page, "exec"), namespace)
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return ""


def _fit_for_here(snippet: Snippet) -> str:
    code = "\n" * (snippet.line - 1) + snippet.code
    for there, here in HERE.items():
        code = re.sub(there, here, code)
    return code


def _start_afresh() -> None:
    import datajoint as dj
    import my_pipeline  # type: ignore[import-not-found]

    import djdist

    for name, field in type(djdist.config).model_fields.items():
        setattr(djdist.config, name, field.default)
    dj.config.jobs.keep_completed = False
    djdist.enable()
    for table in (my_pipeline.Statistics, my_pipeline.Segmentation, my_pipeline.Stats):
        table().delete_quick()
        table.jobs.delete_quick()


def _stop(*_: object) -> None:
    raise TimeoutError(f"a page takes longer than {SECONDS} seconds")


if __name__ == "__main__":
    main()
