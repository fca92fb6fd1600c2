"""What happens before each command: paths, the log, and DataJoint with its configuration."""

import codecs
import io
import logging
import os
import sys
import warnings
from typing import Any

import djdist
from djdist.driver.logs import LINE
from djdist.errors import OptionError

IN_ASCII = {"·": "-", "…": "...", "×": "x", "–": "-"}
"""What terminals without Unicode are shown instead."""


def start(level: int = logging.WARNING) -> None:
    """Get ready to import a pipeline of the current folder.

    Parameters
    ----------
    level : int
        From which level on log lines are shown.

    Raises
    ------
    OptionError
        A setting of DataJoint or djdist can't be used.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    os.environ.setdefault("DJ_LOG_STREAM", "stderr")  # for the processes that are started from here
    _spell_for_terminal()
    _load_datajoint()
    _log_to_stderr(level)
    djdist.enable()


def _spell_for_terminal() -> None:
    """Replace characters that a terminal can't show, instead of failing."""
    codecs.register_error("djdist", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="djdist")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    unknown = error.object[error.start : error.end]
    return "".join(IN_ASCII.get(sign, "?") for sign in unknown), error.end


def _load_datajoint() -> None:
    """Load DataJoint, which may well be configured by the environment alone."""
    warnings.filterwarnings("ignore", "No datajoint.json found")
    try:
        import datajoint  # noqa: F401
    except ValueError as error:
        raise OptionError(f"DataJoint's settings can't be used: {_refusals(error)}") from error


def _refusals(error: ValueError) -> str:
    """Return the settings that pydantic refuses; other errors speak for themselves."""
    refused: list[Any] = getattr(error, "errors", list)()
    return "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in refused) or str(
        error
    )


def _log_to_stderr(level: int) -> None:
    """Leave standard output to what was asked for."""
    from djdist.monitoring.progress_bar import LogAboveBars

    handler = LogAboveBars()
    handler.setFormatter(logging.Formatter(LINE))
    for name in ("datajoint", "djdist"):
        logging.getLogger(name).handlers = [handler]
    logging.getLogger("djdist").setLevel(level)
    if "DJ_LOG_LEVEL" not in os.environ:
        logging.getLogger("datajoint").setLevel(level)
