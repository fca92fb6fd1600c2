"""The commands, in the order in which the help lists them."""

from djdist.cli.app import app

from djdist.cli.commands import populate, progress, jobs, runs  # isort: skip

__all__ = ["app", "jobs", "populate", "progress", "runs"]
