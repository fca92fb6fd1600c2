"""The command line, which needs typer and rich."""
