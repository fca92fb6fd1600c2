"""Who makes a table's keys, and with which code, as the jobs table records it."""

import subprocess
import sys
from pathlib import Path

import datajoint as dj


def user_of(table: dj.Table) -> str:
    """Return the connection's user, as the jobs table records it."""
    return str(table.connection.get_user())


def code_version(table: dj.Table) -> str:
    """Return the git commit of the code that makes a table's keys, if the settings ask for it.

    It is looked up where the table's module lies, or in the working folder for one
    that was typed into a notebook.
    """
    if table.connection._config.jobs.version_method != "git":
        return ""
    module_file = getattr(sys.modules.get(type(table).__module__), "__file__", None)
    folder = Path(module_file).parent if module_file else Path.cwd()
    try:
        git = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
