"""What happens before each command: paths, the log, and DataJoint with its configuration."""

import logging
import os
import sys
import warnings
from typing import Any

import djdist
from djdist.driver.logs import LINE
from djdist.errors import OptionError


def start() -> None:
    """Get ready to import a pipeline of the current folder.

    Raises
    ------
    OptionError
        A setting of DataJoint or djdist can't be used.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    os.environ.setdefault("DJ_LOG_STREAM", "stderr")  # for the processes that are started from here
    _load_datajoint()
    _log_to_stderr()
    djdist.enable()


def _load_datajoint() -> None:
    """Load DataJoint, which may well be configured by the environment alone."""
    warnings.filterwarnings("ignore", "No datajoint.json found")
    try:
        import datajoint  # noqa: F401
    except ValueError as error:
        raise OptionError(f"DataJoint's settings can't be used: {_refusals(error)}") from error


def _refusals(error: ValueError) -> str:
    """Name the settings that pydantic refuses; other errors speak for themselves."""
    refused: list[Any] = getattr(error, "errors", list)()
    return "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in refused) or str(
        error
    )


def _log_to_stderr() -> None:
    """Leave standard output to what was asked for."""
    from djdist.progress_bar import LogAboveBars

    handler = LogAboveBars()
    handler.setFormatter(logging.Formatter(LINE))
    for name in ("datajoint", "djdist"):
        logging.getLogger(name).handlers = [handler]
    logging.getLogger("djdist").setLevel(logging.INFO)
