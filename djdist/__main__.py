"""The command ``djdist``, ``python -m djdist`` too."""

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
    app()


if __name__ == "__main__":
    main()
