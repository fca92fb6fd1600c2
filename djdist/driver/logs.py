"""What a driver on a cluster writes into the log of its process."""

import logging

LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_here() -> None:
    """Write djdist's lines from INFO on to stderr, unless this process's logging is set up already."""
    logger = logging.getLogger("djdist")
    if logger.level or logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(LINE))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
