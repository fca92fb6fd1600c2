"""A pipeline of many tables over two schemas, which has all that a run may stumble over."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj

TEMPLATE = Path(__file__).with_name("whole.py.txt")
TABLES = (
    "Recording",
    "Curated",
    "Filtered",
    "Shape",
    "Units",
    "Match",
    "Tracked",
    "Summary",
    "Average",
    "Best",
    "Reading",
    "Rank",
    "Needed",
    "Needing",
)
"""In an order in which one would populate them one after the other."""

STREAMED = ("Recording", "Curated", "Filtered", "Shape", "Units", "Match", "Tracked", "Needed", "Needing")
"""Those whose rows don't depend on when they are made."""

SESSIONS_TO_SHARE = 12
"""With so many sessions per subject, a worker gets several keys of most tables at a time."""

MAKE_KWARGS: dict[str, dict[str, Any]] = {"Recording": {"gain": 3}}
Rows = dict[str, list[dict[str, Any]]]


def declare(
    raw: str, results: str, folder: Path, notes: str = "", longest_seconds: float = 0.01
) -> ModuleType:
    """Write the pipeline's module into the folder, which is on every worker's path, and import it."""
    name = f"whole_{raw}"
    values = {"RAW": raw, "RESULTS": results, "NOTES": notes, "LONGEST_SECONDS": longest_seconds}
    head = "".join(f"{key} = {value!r}\n" for key, value in values.items())
    (folder / f"{name}.py").write_text(head + TEMPLATE.read_text())
    importlib.invalidate_caches()
    return importlib.import_module(name)


def fill(whole: ModuleType, subjects: int = 2, sessions: int = 3) -> None:
    """Insert so many subjects with so many sessions each; `n` counts the sessions from 1 in key order."""
    whole.Subject.insert({"subject_id": subject} for subject in range(subjects))
    whole.Session.insert(
        {"subject_id": subject, "session": session, "n": subject * sessions + session + 1}
        for subject in range(subjects)
        for session in range(sessions)
    )


def rows(whole: ModuleType) -> Rows:
    """Return the rows of all tables, Part tables among them."""
    return {name: table.to_dicts(order_by="KEY") for name, table in _all_tables(whole)}


def _all_tables(whole: ModuleType) -> Iterator[tuple[str, Any]]:
    for name in TABLES:
        table = getattr(whole, name)
        yield name, table()
        for part in vars(table).values():
            if isinstance(part, type) and issubclass(part, dj.Part):
                yield f"{name}.{part.__name__}", part()
