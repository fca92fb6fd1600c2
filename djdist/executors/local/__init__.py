"""This machine: an executor, in a folder of what changes for reasons of its own."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djdist.executors.local.executor import LocalExecutor as LocalExecutor


def __getattr__(name: str) -> Any:
    """Load the executor when it is asked for: worker processes have no use for it."""
    if name != "LocalExecutor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("djdist.executors.local.executor"), name)
