"""djdist runs DataJoint pipelines on Ray, on Dask and on all processors of this machine.

Public is what this file names, and :mod:`djdist.errors`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from djdist.errors import (
    ClusterError,
    DatabaseError,
    DjdistError,
    IncompatibleDataJointError,
    LeaseLostError,
    MakeError,
    MissingLibraryError,
    OptionError,
    WorkerSetupError,
)

if TYPE_CHECKING:
    from djdist._activation import disable, enable
    from djdist._embedded import embedded
    from djdist._needs import Needs
    from djdist._populate import populate
    from djdist._settings import config
    from djdist.executors.dask import DaskExecutor as DaskExecutor
    from djdist.executors.futures import FuturesExecutor
    from djdist.executors.local import LocalExecutor as LocalExecutor
    from djdist.executors.ray import RayExecutor as RayExecutor
    from djdist.monitoring.progress import progress
    from djdist.monitoring.report import report
    from djdist.monitoring.runs import Run, runs

__version__ = "0.1.0"

__all__ = [
    "ClusterError",
    "DatabaseError",
    "DjdistError",
    "FuturesExecutor",
    "IncompatibleDataJointError",
    "LeaseLostError",
    "MakeError",
    "MissingLibraryError",
    "Needs",
    "OptionError",
    "Run",
    "WorkerSetupError",
    "config",
    "disable",
    "embedded",
    "enable",
    "populate",
    "progress",
    "report",
    "runs",
]

_LATER = {
    "FuturesExecutor": "executors.futures",
    "Needs": "_needs",
    "Run": "monitoring.runs",
    "config": "_settings",
    "disable": "_activation",
    "embedded": "_embedded",
    "enable": "_activation",
    "populate": "_populate",
    "progress": "monitoring.progress",
    "report": "monitoring.report",
    "runs": "monitoring.runs",
}
"""Where the names are that are loaded when first asked for, since DataJoint alone takes seconds."""
_EXECUTORS = {"DaskExecutor": "distributed", "LocalExecutor": "loky", "RayExecutor": "ray"}
"""The executors' classes, and the libraries without which they can't be had."""


if not TYPE_CHECKING:  # or mypy would take each name for one that there is

    def __getattr__(name: str) -> Any:
        if name in _EXECUTORS:
            return import_module("djdist.executors").executor_class(name.removesuffix("Executor").lower())
        if name not in _LATER:
            raise AttributeError(f"module 'djdist' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"djdist.{_LATER[name]}"), name)
        return value


def __dir__() -> list[str]:
    executors = {name for name, library in _EXECUTORS.items() if find_spec(library)}
    return sorted({*globals(), *__all__, *executors})
