"""The command ``djdist``, ``python -m djdist`` too."""

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from djdist.cli.commands import app
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        from djdist._libraries import explained

        sys.stderr.write(f"djdist: {explained(error, 'the command line', 'cli')}\n")
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
