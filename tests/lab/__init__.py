"""The pipeline that tests run: one module per schema, so that workers can import its classes by name."""

from __future__ import annotations

import datetime
import importlib
import sys
from pathlib import Path
from types import ModuleType

import datajoint as dj

TEMPLATE = Path(__file__).with_name("template.py.txt")
FIRST_DATE = datetime.date(2026, 1, 1)


def declare(schema_name: str, folder: Path) -> ModuleType:
    """Write the schema's module into the folder, which is on every worker's path, and import it."""
    name = f"lab_{schema_name}"
    (folder / f"{name}.py").write_text(f'SCHEMA = "{schema_name}"\n' + TEMPLATE.read_text())
    importlib.invalidate_caches()
    return importlib.import_module(name)


def declared_before(schema_name: str) -> ModuleType:
    """Import the schema's module again, whose tables are there."""
    with dj.config.override(database__create_tables=False):  # DataJoint would read each heading
        return importlib.import_module(f"lab_{schema_name}")


def forget(lab: ModuleType) -> None:
    sys.modules.pop(lab.__name__, None)
    Path(str(lab.__file__)).with_suffix(".died").unlink(missing_ok=True)


def fill(lab: ModuleType, subjects: int = 2, sessions: int = 3) -> None:
    """Insert so many subjects with so many sessions each; `n` counts the sessions from 1 in key order."""
    lab.Subject.insert({"subject_id": subject} for subject in range(1, subjects + 1))
    lab.Session.insert(
        {
            "subject_id": subject,
            "session_date": FIRST_DATE + datetime.timedelta(days=session),
            "n": (subject - 1) * sessions + session + 1,
        }
        for subject in range(1, subjects + 1)
        for session in range(sessions)
    )
