"""The command ``djdist``, ``python -m djdist`` too."""

import logging
import os
import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from djdist.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.stderr.write(f'djdist: the command line needs {error.name}: pip install "djdist[cli]"\n')
        sys.exit(2)
    _log_to_stderr()
    app()


def _log_to_stderr() -> None:
    """Leave standard output to what was asked for; DataJoint would log there, in all processes."""
    os.environ.setdefault("DJ_LOG_STREAM", "stderr")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name in ("datajoint", "djdist"):
        logging.getLogger(name).handlers = [handler]
    logging.getLogger("djdist").setLevel(logging.INFO)


if __name__ == "__main__":
    main()
